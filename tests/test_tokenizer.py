"""Token ids depend only on the text, and each has a row in the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import Regex as Pattern

from genlip_megatron.convert.tokenizer import export_tokenizer
from genlip_megatron.tokenizer import END_OF_TURN, load_tokenizer

TEXT = "Two red crosses at the top left, a green square below."


def byte_level(letters: str = "", **model: object) -> Tokenizer:
    """A tokenizer of single bytes (or some letters) with a few merges. The end token is last."""
    alphabet = sorted(letters or pre_tokenizers.ByteLevel.alphabet())
    merges = [("e", "d"), ("r", "ed"), ("t", "h"), ("th", "e")] if not letters else []
    vocabulary = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, **model))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TURN, normalized=False, special=True)])
    return tokenizer


def saved(tokenizer: Tokenizer, path: Path) -> Path:
    tokenizer.save(str(path))
    return path


def stateful(kind: str) -> Tokenizer:
    tokenizer = byte_level(dropout=0.9 if kind == "dropout" else None)
    if kind == "truncation":
        tokenizer.enable_truncation(5)
    if kind == "padding":
        tokenizer.enable_padding(length=200, pad_token=END_OF_TURN)
    return tokenizer


@pytest.mark.parametrize("kind", ["truncation", "padding", "dropout"])
def test_state_in_the_file_is_switched_off(kind: str, tmp_path: Path) -> None:
    plain = load_tokenizer(saved(byte_level(), tmp_path / "plain.json"))
    path = saved(stateful(kind), tmp_path / "tokenizer.json")
    loaded = load_tokenizer(path)
    for _ in range(5):
        assert loaded.encode(TEXT) == plain.encode(TEXT)
        assert loaded.encode_batch([TEXT, "red"]) == [plain.encode(TEXT), plain.encode("red")]
    # An index made with the state counts fewer tokens, so its fingerprint must differ.
    assert loaded.fingerprint != plain.fingerprint and loaded.closing_ids == plain.closing_ids
    export_tokenizer(path, tmp_path / "exported")
    exported = load_tokenizer(tmp_path / "exported" / "tokenizer.json")
    assert exported.fingerprint == loaded.fingerprint
    fields = json.loads((tmp_path / "exported" / "tokenizer.json").read_text())
    assert not (fields["truncation"] or fields["padding"] or fields["model"]["dropout"])


def test_a_file_without_state_keeps_its_bytes(tmp_path: Path) -> None:
    path = saved(byte_level(), tmp_path / "tokenizer.json")
    export_tokenizer(path, tmp_path / "exported")
    assert (tmp_path / "exported" / "tokenizer.json").read_bytes() == path.read_bytes()


def in_front(first: object) -> object:
    return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False)])


LOST_LETTERS = [
    (normalizers.Lowercase(), "makes 'a' and 'A' the same"),
    (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), "the same"),
    (normalizers.BertNormalizer(), "the same"),
    (normalizers.Replace("-", ""), "drops '-'"),
    (pre_tokenizers.Punctuation("removed"), "its pre_tokenizer drops"),
    (pre_tokenizers.Split(Pattern("[0-9]"), "removed"), "its pre_tokenizer drops '0123456789'"),
]
LOST_SPACES = [
    (in_front(pre_tokenizers.WhitespaceSplit()), "it drops spaces"),
    (in_front(pre_tokenizers.Split(Pattern(" +"), "removed")), "it drops spaces"),
    (in_front(pre_tokenizers.Split("\n", "removed")), "no token for a line break"),
    (normalizers.Strip(), "no token for a line break"),
    (normalizers.Replace(Pattern(r"\s+"), " "), "no token for a line break"),
]


@pytest.mark.parametrize(("value", "message"), LOST_LETTERS + LOST_SPACES)
def test_a_file_that_loses_text_is_refused(value: object, message: str, tmp_path: Path) -> None:
    tokenizer = byte_level()
    part = "normalizer" if isinstance(value, normalizers.Normalizer) else "pre_tokenizer"
    setattr(tokenizer, part, value)
    path = saved(tokenizer, tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=message):
        load_tokenizer(path)
    if (value, message) in LOST_LETTERS:
        with pytest.raises(ValueError, match=message):
            export_tokenizer(path, tmp_path / "exported")
        assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("value", [normalizers.NFC(), normalizers.NFKC(), normalizers.Replace(" ", "_"), None])
def test_a_normalizer_that_keeps_letters_is_accepted(value: object, tmp_path: Path) -> None:
    tokenizer = byte_level()
    if value is not None:
        tokenizer.normalizer = value
    assert load_tokenizer(saved(tokenizer, tmp_path / "tokenizer.json")).lost("any text, 猫") == ""


def with_unused_ids(path: Path) -> Path:
    """A file of 36 tokens whose largest id is 700."""
    fields = json.loads(byte_level("abcdefghijklmnopqrstuvwxyz ĊĠ,.<|>_").to_str())
    tokens = {END_OF_TURN: 500, "<|other|>": 700}
    fields["added_tokens"] = [fields["added_tokens"][0] | {"id": i, "content": t} for t, i in tokens.items()]
    fields["model"]["vocab"] |= tokens
    path.write_text(json.dumps(fields))
    return path


def test_the_largest_id_must_fit(tmp_path: Path) -> None:
    path = with_unused_ids(tmp_path / "tokenizer.json")
    for size in (40, 512, 700):
        with pytest.raises(
            ValueError, match=rf"do not fit model.vocab_size = {size}. Set --vocab-size to at least 701"
        ):
            load_tokenizer(path, size)
    tokenizer = load_tokenizer(path, 701)
    assert tokenizer.vocab_size == 701 and tokenizer.closing_ids[0] == 500
    ids = [*tokenizer.encode("a cat"), 700, 500]
    assert tokenizer.decode(ids) == f"a cat<|other|>{END_OF_TURN}"
    assert tokenizer.decode([650, *ids[:5], 703]) == "a cat"


def test_an_export_keeps_ids_after_unused_ones(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    export_tokenizer(with_unused_ids(tmp_path / "tokenizer.json"), tmp_path / "exported")
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert exported.decode([0, 700]) == load_tokenizer(tmp_path / "tokenizer.json", 701).decode([0, 700])
    assert exported.eos_token_id == 500


def test_letters_without_a_token_are_listed(tmp_path: Path) -> None:
    silent = load_tokenizer(saved(byte_level("abcdeghijklmnopqrstuvwxyz ĠĊ"), tmp_path / "silent.json"))
    assert silent.lost("a cat") == "" and silent.lost("a Calf") == "Cf"
    unknown = byte_level("abcdeghijklmnopqrstuvwxyz ĠĊ", unk_token=None)
    unknown.model = models.BPE({"a": 0, "c": 1, "t": 2, "Ġ": 3, "[UNK]": 4, "Ċ": 5}, [], unk_token="[UNK]")
    unknown.add_special_tokens([AddedToken(END_OF_TURN, normalized=False, special=True)])
    tokenizer = load_tokenizer(saved(unknown, tmp_path / "unknown.json"))
    assert tokenizer.lost("a cat") == "" and tokenizer.lost("a bat") == "b"
    assert "[UNK]" in tokenizer.control_tokens
    fields = json.loads(unknown.to_str())
    del fields["model"]["vocab"]["Ċ"]
    with pytest.raises(ValueError, match="no token for a line break"):
        load_tokenizer(saved(Tokenizer.from_str(json.dumps(fields)), tmp_path / "unclosed.json"))


def test_text_without_a_token_is_named_by_unigram_too(tmp_path: Path) -> None:
    # Decoding writes <unk> for an unknown token; the lost letter u is in that text.
    pieces = [("<unk>", 0.0), *((letter, -2.0) for letter in "▁abk\n")]
    unigram = Tokenizer(models.Unigram(pieces, 0, False))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.add_special_tokens([AddedToken(END_OF_TURN, normalized=False, special=True)])
    tokenizer = load_tokenizer(saved(unigram, tmp_path / "tokenizer.json"))
    assert tokenizer.lost("a k b") == "" and tokenizer.lost("a > kub") == ">u"
    assert "<unk>" in tokenizer.control_tokens


@pytest.mark.parametrize("fallback", [True, False])
def test_tokens_for_bytes_must_be_used(fallback: bool, tmp_path: Path) -> None:
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁ac\n"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens([AddedToken(END_OF_TURN, normalized=False, special=True)])
    loaded = load_tokenizer(saved(tokenizer, tmp_path / "tokenizer.json"))
    assert loaded.lost("a 猫") == ("" if fallback else "猫")


def test_markup_is_a_control_token_even_if_not_marked_special(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(["<|fim|>", "<b>", "cat", "\n\n"])
    assert load_tokenizer(saved(tokenizer, tmp_path / "t.json")).control_tokens == (END_OF_TURN, "<|fim|>")
