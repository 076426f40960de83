"""Tokenizers: training the byte-level BPE of the tiny model, and loading any. Not chat formatting.

The prompt -> token ids rule is here (`encode_prompt`), so that pretraining, rollout and
evaluation cannot disagree on it.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from common.errors import UserError
from common.records import Message

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
QWEN2_TOKENIZERS = ("DreamTokenizer", "Qwen2Tokenizer")
PAD, EOS, MASK = "<|pad|>", "<|endoftext|>", "<|mask|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens, with pad, EOS and mask tokens first.

    It splits text exactly as the stock Qwen2 tokenizer does, and is one: `AutoTokenizer` puts the
    pre-tokenizer of the model's family in place of a home-made one when a folder is loaded, without
    a word, and the model would read other tokens than it learned.
    """
    family = Qwen2Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = family.normalizer
    tokenizer.pre_tokenizer = family.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        unk_token=None,
        pad_token=PAD,
        eos_token=EOS,
        mask_token=MASK,
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint folder; UserError if there is none or it has no EOS."""
    # The file as it stands: for some architectures (Qwen2) `AutoTokenizer` rebuilds it around the
    # family's own pre-tokenizer, and the same text would get other ids than in training.
    files = {name for name in TOKENIZER_FILES if (Path(folder) / name).is_file()}
    kind = PreTrainedTokenizerFast if "tokenizer.json" in files else AutoTokenizer
    try:
        if files == {"vocab.json", "merges.txt"}:
            tokenizer = _from_merges(Path(folder))
        else:
            tokenizer = kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: no tokenizer there ({reason})") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # made up from nothing by transformers
        raise UserError(f"{folder}: no tokenizer there; copy tokenizer.json beside config.json")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no EOS token; set eos_token in its config")
    return tokenizer


def _from_merges(folder: Path) -> PreTrainedTokenizerFast:
    """The stock Qwen2 tokenizer from vocab.json, merges.txt and tokenizer_config.json.

    Dream and DiffuCoder ship these and a class of their own (`tokenization_dream.py`), which is
    Qwen2's under another name; an unknown class would need remote code, and is refused.
    """
    config = json.loads((folder / "tokenizer_config.json").read_text())
    kind = str(config.get("tokenizer_class", ""))
    if kind.removesuffix("Fast") not in QWEN2_TOKENIZERS:
        raise ValueError(
            f"tokenizer_class {kind} needs code from the folder, which is never run; "
            "save it once as tokenizer.json"
        )
    lines = (folder / "merges.txt").read_text().splitlines()
    pairs = [line for line in lines if line and not line.startswith("#version")]
    special = {
        f"{role}_token": _text(config.get(f"{role}_token"))
        for role in ("bos", "eos", "pad", "unk", "mask")
    }
    tokenizer = Qwen2Tokenizer(
        vocab=json.loads((folder / "vocab.json").read_text()),
        merges=[tuple(line.split(" ")) for line in pairs],
    )
    # In the order of their ids: each takes the next one, as it did where the folder was written.
    added = sorted((int(i), token) for i, token in config["added_tokens_decoder"].items())
    tokenizer.add_tokens([AddedToken(**token) for _, token in added])
    for number, token in added:
        if tokenizer.convert_tokens_to_ids(token["content"]) != number:
            raise ValueError(f"added token {token['content']} does not get its id {number}")
    tokenizer.add_special_tokens({role: text for role, text in special.items() if text})
    tokenizer.chat_template = config.get("chat_template")
    return tokenizer


def _text(token: object) -> str | None:
    """A token's text, from either of the two forms of tokenizer_config.json."""
    return str(token["content"]) if isinstance(token, dict) else token  # type: ignore[return-value]


def check_tokenizer(
    tokenizer: PreTrainedTokenizerFast, vocab_size: int, mask_token_id: int, folder: Path
) -> None:
    """UserError if the tokenizer cannot belong to a model of `vocab_size` embeddings."""
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"{folder}: tokenizer has {len(tokenizer)} tokens but the model embeds {vocab_size}; "
            "the folder mixes two checkpoints"
        )
    if not 0 <= mask_token_id < vocab_size:
        raise UserError(
            f"{folder}/diffusion.json: mask_token_id {mask_token_id} is outside the vocabulary "
            f"of {vocab_size}"
        )
    mask = tokenizer.mask_token_id
    if mask is not None and mask != mask_token_id:
        raise UserError(
            f"{folder}: diffusion.json says mask_token_id {mask_token_id}, the tokenizer says "
            f"{mask}; the folder mixes two checkpoints"
        )


def encode_prompt(
    tokenizer: PreTrainedTokenizerFast, prompt: str | Sequence[Message]
) -> tuple[int, ...]:
    """Token ids of a prompt: plain text ends with a newline, chat goes through the template."""
    if isinstance(prompt, str):
        return tuple(tokenizer.encode(prompt.rstrip("\n") + "\n", add_special_tokens=False))
    messages = [{"role": m.role, "content": m.content} for m in prompt]
    if tokenizer.chat_template is None:
        raise UserError(
            "the prompt is a list of chat messages, but the tokenizer has no chat template"
        )
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer.encode(str(text), add_special_tokens=False))
