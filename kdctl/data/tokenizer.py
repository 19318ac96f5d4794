"""What makes token numbers of text: a tokenizer file as the `tokenizers` library writes them, or one that is trained.

The extra `text` brings the library. A tokenizer is its file: the SHA-256 of its content says whether two are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdctl.errors import ConfigError, MissingError, Problem
from kdctl.signals import TokenInput

FILE = "tokenizer.json"
_PAD = ("[PAD]", "<pad>", "<|endoftext|>", "<|end_of_text|>")
"""The last two end texts in tokenizers that have no padding; none stands within a text."""
_FIRST, _SEPARATOR, _MASK = ("[CLS]", "<s>"), ("[SEP]", "</s>"), ("[MASK]", "<mask>")
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_UNKNOWN = "<unk>"
_SIGNS = 1000
"""Of how many different signs a tokenizer is made; rarer ones are unknown to it, as in BERT's."""


class Tokenizer:
    """A tokenizer by the text of its file."""

    def __init__(self, text: str, place: str = "") -> None:
        library = _library()
        try:
            self._tokenizer = library.Tokenizer.from_str(text)
        except Exception as error:  # the library raises a bare Exception
            raise ConfigError(Problem(f"this is no tokenizer: {error}", file=place or None)) from None
        self.text = text
        self._tokenizer.no_padding()

    @classmethod
    def read(cls, path: Path) -> Tokenizer:
        """The tokenizer of a file, or of a folder with a tokenizer.json. Raises MissingError where there is none."""
        file = file_of(path)
        if not file.is_file():
            hint = f"name a {FILE}, or the folder of a model that has one"
            raise MissingError(Problem(f"there is no tokenizer at {file}", key="data.tokenizer", hint=hint))
        return cls(file.read_text(encoding="utf-8"), str(file))

    @classmethod
    def trained(cls, texts: Sequence[str], vocab_size: int, kind: str = "wordpiece") -> Tokenizer:
        """A tokenizer of at most `vocab_size` tokens, trained on these texts.

        kind: `wordpiece` over lower-case words, as in BERT (Schuster & Nakajima, ICASSP 2012); `bpe` over bytes, as in
        GPT-2 (Sennrich et al., ACL 2016), which loses nothing; `characters`, all that there are.
        """
        make = {"wordpiece": cls._wordpiece, "bpe": cls._bpe, "characters": cls._characters}[kind]
        return make(texts, vocab_size)

    @classmethod
    def _characters(cls, texts: Sequence[str], vocab_size: int) -> Tokenizer:
        library = _library()
        signs = [_PAD[1], _UNKNOWN, *sorted(set().union(*texts))]
        model = library.models.WordLevel({sign: number for number, sign in enumerate(signs)}, unk_token=_UNKNOWN)
        made = library.Tokenizer(model)
        made.pre_tokenizer = library.pre_tokenizers.Split(library.Regex(r"[\s\S]"), "isolated")
        made.decoder = library.decoders.Fuse()
        return cls(made.to_str())

    @classmethod
    def _bpe(cls, texts: Sequence[str], vocab_size: int) -> Tokenizer:
        library = _library()
        made = library.Tokenizer(library.models.BPE())
        made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = library.decoders.ByteLevel()
        signs = library.pre_tokenizers.ByteLevel.alphabet()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[_PAD[1]], initial_alphabet=sorted(signs), show_progress=False
        )
        made.train_from_iterator(texts, trainer)
        return cls(made.to_str())

    @classmethod
    def _wordpiece(cls, texts: Sequence[str], vocab_size: int) -> Tokenizer:
        library = _library()
        made = library.Tokenizer(library.models.WordPiece(unk_token="[UNK]"))
        made.normalizer = library.normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
        made.decoder = library.decoders.WordPiece()
        first, inside = _alphabet(made, texts)
        settings: dict[str, Any] = {"vocab_size": vocab_size, "show_progress": False, "initial_alphabet": first}
        # The library numbers the signs inside words in the order of a hash table, and ties between merges go by number:
        # so they are given to it in order, as if they were special.
        signs = [*_SPECIAL, *first, *inside]
        made.train_from_iterator(
            texts, library.trainers.WordPieceTrainer(special_tokens=signs, limit_alphabet=len(first), **settings)
        )
        document = json.loads(made.to_str())
        document["added_tokens"] = document["added_tokens"][: len(_SPECIAL)]
        document["model"]["vocab"] = dict(sorted(document["model"]["vocab"].items(), key=lambda word: word[1]))
        made = library.Tokenizer.from_str(json.dumps(document))
        ends = [(name, made.token_to_id(name)) for name in ("[SEP]", "[CLS]")]
        made.post_processor = library.processors.BertProcessing(*ends)
        return cls(made.to_str())

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def tokens(self, length: int, pairs: bool = False) -> TokenInput:
        """What its numbers mean, for texts of at most `length` tokens."""
        pad, first, separator, mask = (self._number(names) for names in (_PAD, _FIRST, _SEPARATOR, _MASK))
        if pad is None:
            raise ConfigError(f"the tokenizer has no token for padding ({' or '.join(_PAD)})")
        size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        return TokenInput(size, length, pad, first, separator, mask, pairs, self.sha256)

    def _number(self, names: Sequence[str]) -> int | None:
        return next((n for n in map(self._tokenizer.token_to_id, names) if n is not None), None)

    def encode(self, texts: Sequence[str], seconds: Sequence[str] | None, length: int) -> list[list[int]]:
        """The numbers of each text, or pair of texts, special ones included, cut to `length`."""
        self._tokenizer.enable_truncation(length)
        inputs = list(texts) if seconds is None else list(zip(texts, seconds, strict=True))
        return [encoded.ids for encoded in self._tokenizer.encode_batch(inputs)]

    def encode_words(self, texts: Sequence[Sequence[str]], length: int) -> list[tuple[list[int], list[int]]]:
        """The numbers of each list of words, as `encode` has them, and which word each of them begins: -1 for none."""
        self._tokenizer.enable_truncation(length)
        found = []
        for encoded in self._tokenizer.encode_batch([list(text) for text in texts], is_pretokenized=True):
            words = [-1 if word is None else word for word in encoded.word_ids]
            begun = [-1 if word == before else word for before, word in zip([-1, *words], words, strict=False)]
            found.append((encoded.ids, begun))
        return found

    def special_count(self, pairs: bool) -> int:
        """How many special tokens it adds to a text, or to a pair of texts."""
        return int(self._tokenizer.num_special_tokens_to_add(pairs))

    def encode_plain(self, text: str) -> list[int]:
        """The numbers of a text of any length, without special ones."""
        self._tokenizer.no_truncation()
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, numbers: Sequence[int]) -> str:
        """The text of some numbers, special ones left out."""
        return self._tokenizer.decode(list(numbers))

    def vocabulary(self) -> list[str]:
        """The tokens in the order of their numbers."""
        size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        return [self._tokenizer.id_to_token(number) or f"<{number}>" for number in range(size)]


def file_of(path: Path) -> Path:
    """The file of a tokenizer that is named by it or by its folder."""
    return path / FILE if path.is_dir() else path


def _alphabet(tokenizer: Any, texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """The most frequent signs of some texts in order, and those that stand inside words, as WordPiece has them."""
    words: Counter[str] = Counter()
    for text in texts:
        words.update(tokenizer.normalizer.normalize_str(text).split())
    counts: Counter[str] = Counter()
    inside: set[str] = set()
    for word, times in words.items():
        for part, _ in tokenizer.pre_tokenizer.pre_tokenize_str(word):
            inside.update(part[1:])
            for sign in part:
                counts[sign] += times
    kept = sorted(sorted(counts, key=lambda sign: (-counts[sign], sign))[:_SIGNS])
    return kept, [f"##{sign}" for sign in kept if sign in inside]


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise MissingError("texts need the tokenizers library", hint="pip install 'kdctl[text]'") from error
    return tokenizers
