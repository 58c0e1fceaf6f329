"""The viewer's page: what is on it is true, safe and small, and a real browser shows it."""
import html
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models

import model as M
import resa
import sae as S
from data.files import TINY
from data.flags import read_preset
from data.formats import save_saelens
from data.rows import read_problems
from tests.claims import view as V
from tests.conftest import ROOT

HOSTILE = ["</script><b>", "<!--<script>", "\u2028", "%DATA%", "</style>", "&lt;", "\n", "`${1}`",
           "|"]
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model of width 32 with 4,096 words, some hostile: model, tokenizer, ids, chunks."""
    path = tmp_path_factory.mktemp("model")
    words = HOSTILE + [f" w{i}" for i in range(4096 - len(HOSTILE))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" w0"))
    tokenizer.save(str(path / "tokenizer.json"))
    config = json.loads((ROOT / "data/tiny/init/config.json").read_text())
    config |= {"vocab_size": len(words), "hidden_size": 32, "intermediate_size": 32,
               "num_hidden_layers": 2, "max_position_embeddings": 4096}
    (path / "config.json").write_text(json.dumps(config))
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(len(words), (2000,), generator=rng)
    ids[100:100 + len(HOSTILE)] = torch.arange(len(HOSTILE))
    spec = f"random:{path}/config.json"
    return (M.load_model(spec), M.load_tokenizer(spec), ids.tolist(),
            torch.randint(len(words), (8, 256), generator=rng))


def random_sae(n_latents, k, **meta):
    sae = S.build("topk", 32, n_latents, k=k).requires_grad_(False)
    sae.meta = {"layer": 1, "site": "resid", "sink_norm": None} | meta
    return sae


@pytest.fixture(scope="module")
def large(tiny, tmp_path_factory):
    """The page of a 2,000-token answer and 65,536 latents."""
    path = tmp_path_factory.mktemp("page") / "view.html"
    model, tokenizer, ids, chunks = tiny
    data = V.view_data(model, tokenizer, random_sae(65536, 32), ids, 50, chunks[:2])
    V.write_page(path, data | {"model": "</script><i>model", "sae": "sae",
                               "examples_from": "text"})
    return path


def payload(page):
    return re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]


def dom(path, profile, size="1280,900"):
    """The page as Chromium has rendered it, with a profile of its own and without a network."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    flags = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
             "--disable-background-networking --disable-component-update --dump-dom")
    words = [CHROMIUM, *flags.split(), f"--user-data-dir={profile}", f"--window-size={size}",
             path.as_uri()]
    return subprocess.run(words, capture_output=True, text=True, timeout=60).stdout


# ---- the page -----------------------------------------------------------------------------------

def test_a_large_page_is_small_and_nothing_in_it_is_fetched_or_run(large):
    page = large.read_text(encoding="utf-8")
    assert len(page.encode()) < 5e6
    inside = payload(page)
    data = json.loads(inside)
    assert len(data["latents"]) > 25_000
    assert len(data["text"]) == 2000
    assert set(HOSTILE) <= set(data["words"]) and data["model"] == "</script><i>model"
    assert "<" not in inside and inside.isascii()
    around = page.replace(inside, "")
    assert around.count("<script") == 2 and "%DATA%" not in around
    assert not re.search(r"https?:|//\w+\.|@import|url\(|src=", around)


def test_chromium_shows_the_large_page_in_less_than_two_seconds(large, tmp_path):
    shown = dom(large, tmp_path)
    root = re.search(r"<html[^>]*>", shown)[0]
    assert "data-error" not in root and 'data-tokens="2000"' in root
    assert int(re.search(r'data-ms="(\d+)"', root)[1]) < 2000
    assert "&lt;/script&gt;&lt;b&gt;" in shown and "<b>" not in shown and "<i>model" not in shown

    def plain(pieces):
        return [html.unescape(re.sub(r"<[^>]*>", "", piece)) for piece in pieces]
    data = json.loads(payload(large.read_text(encoding="utf-8")))
    text, latents, feature = data["text"], data["latents"], data["feature"]
    token = r'<span class="token[^>]*>(?s:(.*?))(?=<span class="token|<h2|</div>)'
    drawn = plain(re.findall(token, shown))
    assert drawn == [data["words"][i].replace("\n", "↵\n") for i in text]
    listed = plain(re.findall(r'<div role="option"[^>]*>(<span[^>]*>\d+)</span>', shown))
    # At the first token of the answer.
    assert listed == [str(latents[f]) for f in feature[32 * 50:32 * 51]]


def test_what_the_page_says_is_what_the_sae_says(tiny):
    model, tokenizer, ids, chunks = tiny
    sae, ids, n = random_sae(512, 8), ids[:300], 5
    rng = torch.Generator().manual_seed(0)
    sae.b_enc += 0.1 * torch.randn(512, generator=rng)       # so that some fire often
    data = V.view_data(model, tokenizer, sae, ids, 20, chunks, top=n)
    z = sae.encode(resa.activations(model, torch.tensor([ids]), 1)[0])    # (T,F)
    seen = sae.encode(resa.activations(model, chunks, 1).flatten(0, 1))    # (N,F)
    latents, feature, value = data["latents"], data["feature"], torch.tensor(data["value"])
    assert data["kept"] == [n] * len(ids)
    best = z.topk(n)
    assert [latents[f] for f in feature] == best.indices.flatten().tolist()
    assert torch.allclose(value, best.values.flatten(), atol=1e-4)
    assert latents == sorted(set(best.indices.flatten().tolist()))
    assert data["times"] == (seen[:, latents] != 0).sum(0).tolist()
    top = seen[:, latents].topk(4, dim=0)    # (4,n)
    at, code = (torch.tensor(data[name]).view(-1, 4) for name in ("example", "code"))
    for i in range(len(latents)):
        fired = int((top.values[:, i] > 0).sum())
        assert at[i, :fired].tolist() == top.indices[:fired, i].tolist()
        assert torch.allclose(code[i, :fired], top.values[:fired, i], atol=1e-4)
        assert (at[i, fired:] == chunks.numel()).all()

    def words(name):
        return [data["words"][i] for i in data[name]]
    assert words("text") == [tokenizer.decode([i]) for i in ids]
    assert words("corpus") == [tokenizer.decode([i]) for i in chunks.flatten().tolist()]
    logits = (sae.W_dec[latents] * model.model.norm.weight) @ model.lm_head.weight.T    # (n,V)
    best = logits.topk(10).indices.flatten().tolist()
    assert words("promotes") == [tokenizer.decode([i]) for i in best]


def test_negative_codes_count_by_their_size_and_keep_their_sign(tiny):
    model, tokenizer, ids, chunks = tiny
    sae = S.build("abstopk", 32, 256, k=8).requires_grad_(False)
    sae.meta = random_sae(64, 1).meta
    data = V.view_data(model, tokenizer, sae, ids[:200], 20, chunks, top=1)
    z = sae.encode(resa.activations(model, torch.tensor([ids[:200]]), 1)[0])    # (T,F)
    value = torch.tensor(data["value"])
    z = z[z.abs().amax(1) > 0]
    best = z.gather(1, z.abs().argmax(1, keepdim=True))[:, 0]    # (T,)
    assert torch.allclose(value, best, atol=1e-4)
    assert (value < 0).any() and (value > 0).any()


def test_a_feature_much_weaker_than_another_is_still_there(tiny):
    model, tokenizer, ids, chunks = tiny
    sae = S.build("relu", 32, 2).requires_grad_(False)
    sae.meta, sae.b_enc[:] = random_sae(64, 1).meta, torch.tensor([1e6, 1.0])
    value = V.view_data(model, tokenizer, sae, ids[:9], 2, chunks)["value"]
    assert all(0.1 < v < 10 for v in value[1::2]) and min(value[::2]) > 9e5


def test_sinks_have_no_features(tiny):
    model, tokenizer, ids, chunks = tiny
    data = V.view_data(model, tokenizer, random_sae(512, 8, sink_norm=1e9), ids[:50], 20, chunks)
    assert data["kept"] == [0] + [8] * 49
    with pytest.raises(ValueError, match="no feature is active"):
        V.view_data(model, tokenizer, random_sae(512, 8, sink_norm=0.0), ids[:50], 20, chunks)


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    """An empty working directory with an SAE of the embedded source in it, untrained."""
    monkeypatch.chdir(tmp_path)
    for name, width, place in (
            ("out/tiny/sae", 128, {"layer": 2, "site": "resid"}), ("anywhere", 128, {}),
            ("narrow", 64, {"layer": 2, "site": "resid"}),
            ("high", 128, {"layer": 7, "site": "resid"})):
        sae = S.build("topk", width, 256, k=8)
        sae.meta = place | {"sink_norm": None}
        S.save_sae(sae, name)
    return tmp_path


def test_view_writes_the_answer_that_the_model_gives(at_home, data, capsys):
    V.main(["--chunks", "2", "--preset", "tiny", "--data", str(data), "--seed", "3", "--temperature", "3"])
    shown = json.loads(payload((at_home / "out/tiny/view/view.html").read_text()))
    text = "".join(shown["words"][i] for i in shown["text"])
    first, source = read_problems(TINY / "test.jsonl")[0], read_preset("tiny")["source"]
    tokenizer = M.load_tokenizer(source)
    prompt = tokenizer.chat([{"role": "user", "content": first["problem"]}])
    (answer,), = M.generate(M.load_model(source), [tokenizer.encode(prompt)], 96, 3.0,
                            stop_ids=tokenizer.eos_ids, seed=3)
    assert text == prompt + tokenizer.decode(answer, skip_special=False)
    assert shown["layer"] == 2 and shown["n_prompt"] == len(tokenizer.encode(prompt))
    n = len(shown["latents"])
    assert f"{len(answer)} tokens of answer, {n} of 256 features active" in capsys.readouterr().out


@pytest.mark.parametrize("words, said", [
    ("--sae nowhere", "nowhere: no such directory"),
    ("--sae narrow", "narrow: the SAE is 64 wide, the model 128"),
    ("--sae high", "layer 7: this model has blocks 0 .. 3"),
    ("--sae anywhere", "anywhere: does not say its layer and its site"),
    ("--preset tiny --source nobody", "nobody: no such directory"),
    ("--chunks 0", "--chunks: 0 should be at least 1"),
    ("--preset tiny --data none.jsonl", "none.jsonl: no such file"),
    ("--device tpu", "device 'tpu' is not one of those here: cpu"),
    ("--quick --chunks 3", "--chunks has no effect with --quick"),
])
def test_view_says_what_is_wrong(at_home, words, said):
    with pytest.raises((ValueError, OSError), match=re.escape(said)):
        V.main(words.split())
    assert not list(at_home.rglob("*.htm*"))


def test_view_without_an_sae_says_how_to_get_one(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "tests.claims.view"], cwd=tmp_path,
                          capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "error: out/tiny/sae: no SAE there; first run train.py --stage sae\n"


def test_quick_writes_a_page_of_a_short_answer(at_home, data):
    V.main(["--quick", "--preset", "tiny", "--data", str(data), "--out", "new/page", "--device", "cpu"])
    shown = json.loads(payload((at_home / "new/page/view.html").read_text()))
    assert len(shown["text"]) <= shown["n_prompt"] + 32


def test_an_sae_of_another_layout_is_read(at_home, data):
    built = S.build("topk", 128, 256, k=8)
    built.meta = {"layer": 2, "site": "resid", "sink_norm": None}
    save_saelens(built, "lens")
    for spec in ("lens", "out/tiny/sae"):
        V.main(["--quick", "--preset", "tiny", "--data", str(data), "--sae", spec, "--out", f"{spec}-page"])
    lens, ours = (json.loads(payload((at_home / f"{spec}-page/view.html").read_text()))
                  for spec in ("lens", "out/tiny/sae"))
    assert lens.pop("sae") != ours.pop("sae") and lens == ours
