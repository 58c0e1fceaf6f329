"""Tokenizers and chat templates as checkpoints have them: text -> ids, messages -> text.

    tokenizer = Tokenizer("data/tiny/distill")
    ids = tokenizer.encode(tokenizer.chat([{"role": "user", "content": "..."}]))
"""

import json
import os
import re
import resource
import sys
import time
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
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

    def __init__(self, directory):
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
        """[{"role", "content"}, ...] -> the text that the checkpoint's own template makes of it."""
        check(self.template, "this tokenizer has no chat_template; add a chat_template.jinja")
        try:
            with bounded():
                text = compiled(self.template).render(
                    messages=messages, tools=None, documents=None,
                    add_generation_prompt=add_generation_prompt, **self.special)
            check(len(text) < 2**20, "makes a text of more than a million characters")
            return text
        except Exception as error:           # whatever a stranger's program raises, in one line
            reason = one_line(error) or type(error).__name__
            raise ValueError(f"chat template: {reason}") from None

def think_prefix(prompt):
    """"<think>" if a chat template ended the prompt with it: the completion then lacks it."""
    return "<think>" if prompt.rstrip().endswith("<think>") else ""

# ---- Chat templates are strangers' programs ----------------------------------------------------

SECONDS, MEMORY = 0.5, 2**25         # processor time and bytes that a template may take

@contextmanager
def bounded():
    """Inside, a template may take SECONDS and MEMORY, without a thread or a process to watch it.
    The clock is looked at before each of its lines, and each call of what it uses."""
    def watch(frame, event, arg):
        if time.thread_time() > end:
            raise TimeoutError(f"stopped after {SECONDS} seconds")
        return watch if frame.f_code.co_filename == "<template>" else None
    before, limits = sys.gettrace(), resource.getrlimit(resource.RLIMIT_AS)
    if os.path.exists("/proc/self/statm"):               # Linux
        with open("/proc/self/statm", encoding="ascii") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, limits[1]))
    end = time.thread_time() + SECONDS
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)
        resource.setrlimit(resource.RLIMIT_AS, limits)

@lru_cache(maxsize=8)
def compiled(template):
    """A template in jinja2's immutable sandbox, where numbers also stay small: one product or power
    of large ones could take for ever."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context, operator, left, right):
            numbers = [x for x in (left, right) if isinstance(x, int)]
            small = all(abs(x) < 2**31 for x in numbers) and (operator == "*" or right < 64)
            check(small, f"{operator} of numbers as large as these is not supported")
            return super().call_binop(context, operator, left, right)

    def to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)           # jinja2's own escapes for HTML

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    # {% generation %} marks what training on answers would keep; for the text it is a scope.
    template = re.sub(r"(\{%[-+]?\s*)(end)?generation\b", r"\1\2with", template)
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True,
                      extensions=["jinja2.ext.loopcontrols"])
    sandbox.filters["tojson"] = to_json
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return sandbox.from_string(template)
