"""The trained byte-level BPE: lossless, ordered specials, and the same ids after loading."""

import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common.errors import UserError
from common.records import Message
from models.checkpoint import new_model, save_checkpoint
from models.spec import DiffusionSpec
from models.tokenizer import check_tokenizer, encode_prompt, load_tokenizer, train_tokenizer

TEXTS = [
    "def f(xs):\n    return [x for x in xs if x % 2 == 0]\n",
    "# keep the even numbers, then sum 1234567; don't stop\n\n\n    y  = 10",
] * 5
# Digits, runs of blanks and lines, apostrophes, and a letter in decomposed form.
TRICKY = "# don't 20240 \n\n\n\tx  =  [1,22 ,333]\r\n  e\u0301 \u00e9 \u6f22 \U0001f600"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300)


def test_specials_come_first(tokenizer: PreTrainedTokenizerFast) -> None:
    assert [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id] == [0, 1, 2]
    assert len(tokenizer) <= 300


@pytest.mark.parametrize("text", [*TEXTS[:2], TRICKY, " ", "\n"])
def test_lossless_but_for_composed_letters(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    found = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
    assert found == unicodedata.normalize("NFC", text)


def test_training_is_a_function_of_the_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    """A run that reuses finished stages trains the tokenizer again."""
    assert train_tokenizer(iter(TEXTS), 300).get_vocab() == tokenizer.get_vocab()


def save_beside_a_model(tokenizer: PreTrainedTokenizerFast, folder: Path, model_type: str) -> None:
    architecture = {
        "model_type": model_type,
        "vocab_size": 300,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }
    spec = DiffusionSpec(mask_token_id=2, logit_shift=False, attention="causal", block_size=1)
    save_checkpoint(folder, new_model(architecture, 0), tokenizer, spec)


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_a_loaded_tokenizer_gives_the_same_ids(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, model_type: str
) -> None:
    """RL must read the ids that pretraining wrote, whatever the family of the model."""
    save_beside_a_model(tokenizer, tmp_path, model_type)
    loaded = load_tokenizer(tmp_path)
    stock = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in (*TEXTS[:2], TRICKY):
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))
        if model_type == "qwen2":  # AutoTokenizer puts a family's own pre-tokenizer in place
            assert stock.encode(text) == tokenizer.encode(text)
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.mask_token_id) == (0, 1, 2)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert load_tokenizer(again).encode(TRICKY) == tokenizer.encode(TRICKY)


def test_a_home_made_tokenizer_is_taken_as_it_stands(tmp_path: Path) -> None:
    """AutoTokenizer would put Qwen2's pre-tokenizer in its place, and other ids in training."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    home_made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", mask_token="<mask>"
    )
    save_beside_a_model(home_made, tmp_path, "qwen2")
    stock = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert stock.encode(TRICKY) != home_made.encode(TRICKY)
    assert load_tokenizer(tmp_path).encode(TRICKY) == home_made.encode(TRICKY)


def test_prompts_end_with_one_newline(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode_prompt(tokenizer, "# add\n\n")
    assert tokenizer.decode(ids) == "# add\n"
    assert ids == encode_prompt(tokenizer, "# add")


def test_chat_goes_through_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = (Message("user", "add"),)
    with pytest.raises(UserError, match="no chat template"):
        encode_prompt(tokenizer, chat)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    try:
        assert tokenizer.decode(encode_prompt(tokenizer, chat)) == "user:add;assistant:"
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("vocab_size", "mask_token_id", "message"),
    [
        (100, 2, "the model embeds 100"),
        (300, 300, "outside the vocabulary"),
        (300, -1, "outside the vocabulary"),
        (300, 5, "the tokenizer says 2"),
    ],
)
def test_a_tokenizer_of_another_checkpoint(
    tokenizer: PreTrainedTokenizerFast, vocab_size: int, mask_token_id: int, message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        check_tokenizer(tokenizer, vocab_size, mask_token_id, Path("some/folder"))
    assert "some/folder" in str(raised.value) and "\n" not in str(raised.value)


def test_a_fitting_tokenizer_passes(tokenizer: PreTrainedTokenizerFast) -> None:
    check_tokenizer(tokenizer, 300, 2, Path("some/folder"))
    check_tokenizer(tokenizer, 512, 2, Path("some/folder"))  # padded embeddings are common


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer there"):
        load_tokenizer(tmp_path)


def test_no_eos(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="no EOS"):
        load_tokenizer(tmp_path)
