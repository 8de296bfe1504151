"""A checkpoint's own tokenizer, by the library ``tokenizers``: ``tokenizer.json``, or CLIP's two files."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitdeploy.bundle.files import sha256
from vitdeploy.checkpoint.documents import AGAIN, read_json
from vitdeploy.checkpoint.refusals import cut, shown
from vitdeploy.errors import CheckpointError, MissingDependency

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

_WHOLE, _SETTINGS, _CLIP = "tokenizer.json", "tokenizer_config.json", ("vocab.json", "merges.txt")
_SENTENCEPIECE = "spiece.model"
FILES = (_WHOLE, _SETTINGS, *_CLIP)
"""What is read, where it is there."""
_START, _END, _WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
_CLIP_WORDS = (
    *(r"<\|startoftext\|>", r"<\|endoftext\|>"),
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"),
    *(r"\p{L}+", r"\p{N}", r"[^\s\p{L}\p{N}]+"),
)
"""What CLIP's tokenizer cuts a text into: special tokens, contractions, letters, single digits, the rest."""
INSTEAD = "ready-made vectors need neither text tower nor tokenizer: --zero-shot FILE.safetensors"
"""A hint."""


def canonical(text: str) -> str:
    """As SigLIP was trained: lower case, without punctuation, one space between words."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(bare.split())


Clean = Callable[[str], str]
_CLEANED: Mapping[str, Clean] = {
    "SiglipTokenizer": canonical,
    "Siglip2Tokenizer": str.lower,
    "GemmaTokenizer": str.lower,
}
"""What becomes of a text before it reaches its tokenizer, by ``tokenizer_class``. SigLIP 2 has Gemma's
tokenizer, and was trained on lower case."""
CLEANING: Mapping[str, Clean] = {
    "canonicalize": lambda text: canonical(text.replace("_", " ")),
    "lower": lambda text: " ".join(text.split()).lower(),
    "whitespace": lambda text: " ".join(text.split()),
}
"""The same by open_clip's names."""


@dataclass(frozen=True)
class Tokenizer:
    """Texts to numbers of tokens."""

    library: Library
    clean: Clean
    padding: int | None
    """The token that fills a text up; None where no file names one."""
    left: bool
    """Whether it is filled up before its beginning."""
    files: Mapping[str, str]
    """File names to sha256."""

    def __call__(self, text: str) -> list[int]:
        """The text with its special tokens, neither padded nor cut.

        Raises:
            CheckpointError: the tokenizer has no token for a part of it, not even an unknown one.
        """
        try:
            tokens: list[int] = self.library.encode(self.clean(text)).ids
        except Exception as error:  # the library raises plain exceptions
            message = f"the tokenizer fails at {shown(text)}: {_reason(error)}"
            raise CheckpointError(message, hint=f"correct it; or {INSTEAD}") from error
        return tokens

    def padded(self, text: str, length: int) -> list[int]:
        """The same, filled up to a length; what is longer stays so.

        Raises:
            CheckpointError: no file names a token to fill up with.
        """
        tokens = self(text)
        missing = length - len(tokens)
        if missing > 0 and self.padding is None:
            raise CheckpointError(
                f"{_SETTINGS} names no known pad_token, and texts must be padded to {length} tokens",
                hint=AGAIN,
            )
        rest = [self.padding or 0] * max(0, missing)
        return rest + tokens if self.left else tokens + rest


def read_tokenizer(folder: Path, source: str, usual: str, clean: Clean | None = None) -> Tokenizer:
    """The tokenizer in a checkpoint's folder.

    Args:
        source: what the user calls the checkpoint, for errors.
        usual: the ``tokenizer_class`` that is meant where no file states one.
        clean: what becomes of a text before it reaches the tokenizer; as its class has it when None.

    Raises:
        MissingDependency: the library is not installed.
        CheckpointError: there is no tokenizer, or it is damaged.
    """
    settings = read_json(folder / _SETTINGS) if (folder / _SETTINGS).is_file() else {}
    names = [name for name in FILES if (folder / name).is_file()]
    if _WHOLE in names:
        names = [name for name in names if name not in _CLIP]
    elif set(_CLIP) - set(names):
        if (folder / _SENTENCEPIECE).is_file():
            raise CheckpointError(
                f"{source} has its tokenizer as {_SENTENCEPIECE} alone, which is not read",
                hint=f"put the model's {_WHOLE} beside it; or {INSTEAD}",
            )
        raise CheckpointError(
            f"{source} has no tokenizer beside its weights: no {_WHOLE}, nor {' and '.join(_CLIP)}",
            hint=f"put it there; or {INSTEAD}",
        )
    library = _load(folder, _WHOLE in names)
    padding = _padding(library, settings)
    library.no_padding()
    library.no_truncation()
    kind = str(settings.get("tokenizer_class") or usual).removesuffix("Fast")
    if clean is None:
        clean = _CLEANED.get(kind, str) if settings.get("do_lower_case", True) else str
    left = settings.get("padding_side") == "left"
    return Tokenizer(library, clean, padding, left, {name: sha256(folder / name) for name in names})


def _load(folder: Path, whole: bool) -> Library:
    try:
        import tokenizers
    except ImportError as error:
        purpose = "a zero-shot head from labels in words"
        raise MissingDependency("tokenizers", extra="zero-shot", purpose=purpose) from error
    try:
        if whole:
            return tokenizers.Tokenizer.from_file(str(folder / _WHOLE))
        return _clip(*(str(folder / name) for name in _CLIP))
    except Exception as error:  # the library raises plain exceptions
        name = _WHOLE if whole else " and ".join(_CLIP)
        message = f"{folder}: no tokenizer can be made of {name}: {_reason(error)}"
        raise CheckpointError(message, hint=AGAIN) from error


def _reason(error: Exception) -> str:
    return cut(" ".join(str(error).split()), 120)


def _clip(vocabulary: str, merges: str) -> Library:
    """CLIP's byte pairs (Radford et al. 2021), as its ``vocab.json`` and ``merges.txt`` have them."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    pairs = models.BPE.from_file(
        vocabulary,
        merges,
        unk_token=_END,
        continuing_subword_prefix="",
        end_of_word_suffix=_WORD_END,
    )
    library = Tokenizer(pairs)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    library.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex("|".join(_CLIP_WORDS)), behavior="removed", invert=True)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    start, end = (library.token_to_id(token) for token in (_START, _END))
    if start is None or end is None:
        raise ValueError(f"there is no {_START} or {_END}")
    library.add_special_tokens([_START, _END])
    library.post_processor = processors.RobertaProcessing(
        (_END, end), (_START, start), trim_offsets=False, add_prefix_space=False
    )
    return library


def _padding(library: Library, settings: Mapping[str, Any]) -> int | None:
    """The padding token that the settings name, or that tokenizer.json pads with."""
    token = settings.get("pad_token")
    name = token.get("content") if isinstance(token, Mapping) else token
    if isinstance(name, str):
        return library.token_to_id(name)
    stated = library.padding or {}
    number = stated.get("pad_id")
    return number if isinstance(number, int) else None
