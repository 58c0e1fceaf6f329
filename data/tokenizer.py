"""Tokenizers and chat templates as checkpoints have them: text -> ids, messages -> text.

    tokenizer = Tokenizer("data/tiny/distill")
    ids = tokenizer.encode(tokenizer.chat([{"role": "user", "content": "..."}]))
"""

import json
import os
import re
import sys
import time
from collections.abc import Iterator, MappingView
from datetime import datetime
from functools import lru_cache, wraps
from inspect import CO_GENERATOR
from pathlib import Path

from data.files import REQUIRED, check, one_line, read_fields, read_json, read_text

TOKENIZER_FIELDS = dict.fromkeys(            # as text, or {"content": "<s>", "lstrip": false}
    ("bos_token", "eos_token", "unk_token", "pad_token"), ((str, dict), None, None, None))
TOKENIZER_FIELDS |= {"chat_template": (str, None, None, None),
                     "eos_token_id": ((int, [int]), None, None, [])}
CONTENT = {"content": (str, None, None, REQUIRED)}

class Tokenizer:
    """tokenizer.json, with the checkpoint's own chat template and end tokens.
    special  {"bos_token": "<s>", ...}: what chat templates may ask for
    eos_ids  the union of what three files call the end: those of published base models disagree,
             and a sampler that knows only one of them never stops"""

    def __init__(self, directory, plain=False):
        from tokenizers import Tokenizer as Fast
        directory = Path(directory)
        path = directory / "tokenizer.json"
        try:
            self.fast = Fast.from_file(str(path))
        except Exception as error:           # the library raises plain Exception
            raise ValueError(f"{path}: not a readable tokenizer ({error})") from None
        self.fast.no_truncation()            # limits that a trainer left there must not cut texts
        self.fast.no_padding()               # nor add to them
        self.special, self.eos_ids = {}, set()
        for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            path = directory / name
            found = read_fields(read_json(path) if path.exists() else {}, TOKENIZER_FIELDS, path)
            ids = found.pop("eos_token_id")
            ids = ids if isinstance(ids, list) else [ids]
            self.eos_ids |= {i for i in ids if i >= 0}       # -1 says that there is none
            for field, token in found.items():
                if isinstance(token, dict):
                    token = read_fields(token, CONTENT, f"{path}: {field}")["content"]
                if token is not None:
                    self.special[field] = token
        self.plain = plain                   # chats become plain text, see `chat`
        own, jinja = self.special.pop("chat_template", None), directory / "chat_template.jinja"
        self.template = read_text(jinja) if jinja.exists() else own
        self.own_eos_id = self.fast.token_to_id(self.special.get("eos_token", ""))
        self.eos_ids |= {self.own_eos_id} - {None}       # token_to_id gives None for unknown ones

    @property
    def eos_id(self):
        """The end token that joins packed documents: the tokenizer's own, else the smallest."""
        check(self.eos_ids, "no end-of-text token in tokenizer_config, config, generation_config")
        return min(self.eos_ids) if self.own_eos_id is None else self.own_eos_id

    def encode(self, text):
        """str -> list of ids.  Nothing is added: a chat string has its BOS in it."""
        text.encode()                        # ValueError: half a character, as of a broken locale
        return self.fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids, skip_special=True):
        return self.fast.decode(list(ids), skip_special_tokens=skip_special)

    def chat(self, messages, add_generation_prompt=True):
        """[{"role", "content"}, ...] -> the text that the checkpoint's own template makes of it;
        if it is asked in plain text, the contents with blank lines between."""
        if self.plain:
            return "\n\n".join(turn["content"] for turn in messages) + "\n\n"
        check(self.template, "this tokenizer has no chat_template: --template plain asks in plain "
              "text; or add a chat_template.jinja")
        given = {"messages": messages, "tools": None, "documents": None, **self.special}
        try:
            template = in_time(lambda: compiled(self.template))
            template.environment.left = WORK
            return in_time(lambda: template.render(
                add_generation_prompt=add_generation_prompt, **given))
        except (Exception, OutOfTime) as error:      # whatever a stranger's program raises
            reason = one_line(error) or type(error).__name__
            raise ValueError(f"chat template: {reason}") from None

def think_prefix(prompt):
    """"<think>" if a chat template ended the prompt with it: the completion then lacks it."""
    return "<think>" if prompt.rstrip().endswith("<think>") else ""

# ---- Chat templates are strangers' programs ----------------------------------------------------

WORK, SECONDS = 10**7, 0.8       # characters that a template may make, processor time it may take

class OutOfTime(BaseException):
    """Not an Exception: jinja2 catches some of those."""

def in_time(run):
    """run(), which ends after SECONDS.  A trace function sees each line of a template and each call
    of its functions, so this takes no thread and no signal; what one may do is bounded by WORK."""
    import jinja2
    files = __file__, os.path.dirname(jinja2.__file__)       # where a template's functions are
    end, before = time.thread_time() + SECONDS, sys.gettrace()

    def watch(frame, event, arg):
        # In a generator, or what the garbage collector calls, the error could be lost.
        code, line = frame.f_code, event == "line"
        ours = code.co_filename.startswith(files) and not code.co_flags & CO_GENERATOR
        if (line or ours) and time.thread_time() > end:
            raise OutOfTime(f"stopped after {SECONDS} seconds")
        return watch if code.co_filename == "<template>" else None
    sys.settrace(watch)
    try:
        return run()
    finally:
        sys.settrace(before)

def size(value):
    """The length of a value as text, about.  What stands in a list twice counts twice."""
    if isinstance(value, (dict, MappingView)):
        value = [*value, *getattr(value, "values", list)()]
    if isinstance(value, (list, tuple)):
        return 1 + sum(map(size, value))
    return len(value) if isinstance(value, (str, bytes, range)) else 1

@lru_cache(maxsize=1)
def sandbox_class():
    """The class `Sandbox`, made where it is first needed: jinja2 is imported lazily."""
    from jinja2 import nodes, sandbox, utils
    from jinja2.runtime import Macro
    from jinja2.visitor import NodeTransformer

    class Paid(NodeTransformer):
        """Makes filters of what a sandbox does not see: a ~ b, lists, tuples, dicts, slices."""

        def visit_Concat(self, node):
            parts = nodes.Tuple(self.generic_visit(node).nodes, "load")
            return nodes.Filter(parts, "join", [], [], None, None)

        def visit_List(self, node):
            node = self.generic_visit(node)
            target = getattr(node, "ctx", "") == "store"     # of {% set a, b = .. %}
            return node if target else nodes.Filter(node, "paid", [], [], None, None)

        def visit_Getitem(self, node):
            visit = self.visit_List if isinstance(node.arg, nodes.Slice) else self.generic_visit
            return visit(node)

        visit_Tuple = visit_Dict = visit_List

    class Namespace(utils.Namespace):
        __repr__ = object.__repr__           # theirs prints all that is in it, and what is in that

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        """jinja2's immutable sandbox, in which every operation is paid for before it makes
        anything.  It costs the length of what goes in, times the largest number: a text may be
        repeated so often, or padded so far.  Where one text may be put into another many times,
        it costs their product."""
        intercepted_binops = frozenset(sandbox.SandboxedEnvironment.default_binop_table)
        left = WORK

        def __init__(self):
            super().__init__(trim_blocks=True, lstrip_blocks=True, finalize=self.paid,
                             extensions=["jinja2.ext.loopcontrols"])
            for name in "urlize", "wordwrap", "pprint", "sum", "format":     # slow, or of any width
                del self.filters[name]
            self.filters |= {"tojson": to_json, "paid": self.paid}
            self.filters = {name: self.checked(f, name) for name, f in self.filters.items()}
            del self.globals["lipsum"]
            self.globals |= {"namespace": Namespace, "raise_exception": raise_exception,
                             "strftime_now": strftime_now}

        def _parse(self, *source):
            return Paid().visit(super()._parse(*source))

        def pay(self, name, *values):
            lengths = sorted([1, 1, *map(size, values)])
            cost = sum(lengths)
            if name in ("join", "replace", "indent", "tojson", "translate"):
                cost = lengths[-1] * lengths[-2]
            if name not in ("+", "-"):
                cost *= max([1, *(abs(value) for value in values if isinstance(value, int))])
            self.left -= cost * cost if name == "**" else cost
            check(self.left >= 0, f"{name} would make more than {WORK:,} characters")

        def paid(self, value):
            self.pay("a value", value)
            return value

        def concat(self, parts):             # what the template, a macro or a block prints
            parts = list(parts)
            self.pay("the text", parts, 10)
            return "".join(parts)

        def checked(self, function, name, this=None):
            """A function that is paid for.  Iterators become lists, whose length one can see."""
            @wraps(function)
            def call(*args, **kwargs):
                args = [list(arg) if isinstance(arg, Iterator) else arg for arg in args]
                self.pay(name, this, *args, *kwargs.values())
                return function(*args, **kwargs)
            return call

        def call(self, context, f, /, *args, **kwargs):
            if not isinstance(f, Macro):     # what a macro does is paid for
                f = self.checked(f, getattr(f, "__name__", "a call"), getattr(f, "__self__", None))
            return super().call(context, f, *args, **kwargs)

        def call_binop(self, context, operator, left, right):
            check(operator != "%" or not isinstance(left, str), "text % values is not supported")
            self.pay(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def wrap_str_format(self, value):
            check(not super().wrap_str_format(value), "str.format is not supported")

    return Sandbox

def to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)               # jinja2's own escapes for HTML

def raise_exception(message):
    raise ValueError(message)

def strftime_now(form):
    check(len(form) < 100, "the format of a date has 100 characters or more")
    return datetime.now().strftime(form)

@lru_cache(maxsize=8)
def compiled(template):
    check(len(template) <= 2**16, "has more than 65,536 characters")
    # {% generation %} marks what training on answers would keep; for the text it is a scope.
    template = re.sub(r"(\{%[-+]?\s*)(end)?generation\b", r"\1\2with", template)
    return sandbox_class()().from_string(template)
