"""Data sets of the Hugging Face Hub, by name, and folders in their form (extra `datasets`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from kdctl.config.types import Fraction, PathStr, PositiveInt
from kdctl.data.corpus import Corpus
from kdctl.data.rows import TAG, Numbered, Row
from kdctl.data.text import Text
from kdctl.errors import ConfigError, MissingError, Problem, did_you_mean

_AT_ONCE = 1000
_CLASSES = ("names", "int2str")


class Hub:
    """A data set of the Hub, `NAME` or `NAME@REVISION`, or one in a folder, as the datasets library reads it.

    Code that comes with a data set is never run: the library from version 4 on has no way to. Raises MissingError where
    the library is missing or the data set cannot be had, ConfigError where a split or column is not.
    """

    def __init__(self, name: str | None, root: str | None, subset: str | None) -> None:
        if (name is None) == (root is None):
            message = "one of data.name, a name on the Hugging Face Hub, and data.root, a folder, says which data set"
            raise ConfigError(Problem(message, key="data.name"))
        self.folder = None if root is None else Path(root).expanduser()
        if self.folder is not None and not self.folder.is_dir():
            raise MissingError(Problem(f"there is no folder {self.folder}", key="data.root"))
        self.name, self.subset = name, subset
        self._loaded: dict[str, Any] = {}

    def place(self, split: str) -> Path:
        """Where messages say that a row stands."""
        return Path(self.name or str(self.folder), *filter(None, [self.subset]), split)

    def columns(self, split: str) -> dict[str, Any]:
        """What each column of a split holds."""
        return dict(self._split(split).features)

    def rows(self, split: str) -> Iterator[Row]:
        """The rows of a split, with classes under their names."""
        found = self._split(split)
        names = {column: class_names(feature) for column, feature in found.features.items()}
        classes = {column: given for column, given in names.items() if given is not None}
        for batch in found.iter(batch_size=_AT_ONCE):
            for values in zip(*batch.values(), strict=True):
                row = dict(zip(batch, values, strict=True))
                yield row | {column: _said(row[column], given) for column, given in classes.items()}

    def check_column(self, split: str, column: str, key: str) -> None:
        """Raises the ConfigError of a column that is not there."""
        there = list(self.columns(split))
        if column not in there:
            message = f"{self.place(split)} has no column '{column}'; there are: {', '.join(there)}"
            raise ConfigError(Problem(message, key=f"data.{key}", hint=did_you_mean(column, there)))

    def _split(self, split: str) -> Any:
        if split not in self._loaded:
            library = _datasets()
            name, _, revision = (self.name or "").partition("@")
            try:
                self._loaded[split] = library.load_dataset(
                    str(self.folder or name), self.subset, split=split, revision=revision or None
                )
            except Exception as error:  # the library raises many kinds
                raise self._not_had(error, split) from error
        return self._loaded[split]

    def _not_had(self, error: Exception, split: str) -> Exception:
        first = (str(error).strip().splitlines() or [repr(error)])[0]
        place = self.name or self.folder
        if "split" in first:
            hint = "data.train, data.val and data.test name its splits"
            return ConfigError(Problem(f"{place} has no split '{split}': {first}", key="data.train", hint=hint))
        if "Config name is missing" in first or "BuilderConfig" in first:
            said = " ".join(str(error).split())[:300]
            return ConfigError(Problem(f"{place}: {said}", key="data.subset", hint="data.subset names one of them"))
        hint = "is that its name, is there a network, and has it no need of a login?"
        return MissingError(Problem(f"{place} could not be had: {first}", key="data.name", hint=hint))


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        hint = "pip install 'kdctl[datasets]'"
        raise MissingError(Problem("datasets is not installed", key="data.kind", hint=hint)) from error
    if int(datasets.__version__.partition(".")[0]) < 4:
        message = f"datasets {datasets.__version__} is too old: 4.0 at least, which runs no code of a data set"
        raise MissingError(Problem(message, key="data.kind", hint="pip install -U 'kdctl[datasets]'"))
    datasets.disable_progress_bars()
    if os.environ.get("KDCTL_OFFLINE", "0") not in ("", "0"):
        datasets.config.HF_HUB_OFFLINE = True
    return datasets


def class_names(feature: Any) -> list[str] | None:
    """The names of the classes of a column, or of those in its lists; None where it holds none."""
    inner = getattr(feature, "feature", feature)
    return list(inner.names) if all(hasattr(inner, name) for name in _CLASSES) else None


def _said(value: Any, names: list[str]) -> Any:
    """Numbers of classes as their names; -1, by which the Hub's test splits hide a label, is none, and so is a list
    with one."""
    if isinstance(value, list):
        hidden = any(number is None or number < 0 for number in value)
        return None if hidden else [names[number] for number in value]
    return None if value is None or value < 0 else names[value]


class HubText(Text):
    """Texts with labels of a data set on the Hugging Face Hub; tokenised once, and kept.

    name: its name there, with @REVISION where a certain one is meant (glue, nyu-mll/glue@main). root: in its place a
    folder of such a data set (.parquet, .csv or .jsonl files). subset: its configuration where it has several (sst2).
    train, val, test: its splits. text, pair, label: their columns; label: null where no text has one. The classes are
    those that the column names, in its order, or `class_names`; -1 is no label. Of token_classification text and label
    are columns of lists (`tokens`, and `tags` unless told otherwise). What else there is, is as for `text`.
    Raises MissingError where it cannot be had, ConfigError for a split or column that is not.
    """

    def __init__(
        self,
        *,
        name: str | None = None,
        root: PathStr | None = None,
        subset: str | None = None,
        train: str = "train",
        val: str | None = None,
        test: str | None = None,
        text: str = "text",
        pair: str | None = None,
        label: str | None = "label",
        separator: str = ",",
        class_names: list[str] | None = None,
        tokenizer: PathStr | None = None,
        vocab_size: PositiveInt = 8000,
        max_length: PositiveInt = 128,
        target: str = "class",
    ) -> None:
        self.hub = Hub(name, root, subset)
        super().__init__(
            root=root or ".", train=train, val=val, test=test, text=text, pair=pair, label=label, separator=separator,
            class_names=class_names, tokenizer=tokenizer, vocab_size=vocab_size, max_length=max_length, target=target,
        )  # fmt: skip

    def open(self, name: str) -> tuple[Path, Numbered]:
        split = self.files[name]
        if not self.words:
            for key, column in (("text", self.text), ("pair", self.pair), ("label", self.label)):
                if column is not None:
                    self.hub.check_column(split, column, key)
        return self.hub.place(split), enumerate(self.hub.rows(split), 1)

    def given_names(self) -> list[str] | None:
        given = super().given_names()
        if given is not None or self.label is None:
            return given
        columns = self.hub.columns(self.files["train"])
        usual = TAG if self.words and self.label == "label" else self.label
        return class_names(columns.get(self.label, columns.get(usual)))


class HubCorpus(Corpus):
    """Plain texts of a data set on the Hugging Face Hub, for language models; tokenised once, and kept.

    name, root, subset: as for hub_text. train, val, test: its splits. text: the column of the text. What else there is,
    is as for `corpus`. Raises MissingError where it cannot be had, ConfigError for a split or column that is not.
    """

    def __init__(
        self,
        *,
        name: str | None = None,
        root: PathStr | None = None,
        subset: str | None = None,
        train: str = "train",
        val: str | None = None,
        test: str | None = None,
        val_share: Fraction = 0.05,
        test_share: Fraction = 0.05,
        text: str = "text",
        tokenizer: PathStr | None = None,
        units: Literal["bpe", "wordpiece", "characters"] | None = None,
        vocab_size: PositiveInt = 4000,
        max_length: PositiveInt = 128,
        target: str,
    ) -> None:
        self.hub = Hub(name, root, subset)
        super().__init__(
            root=root or ".", train=train, val=val, test=test, val_share=val_share, test_share=test_share, text=text,
            tokenizer=tokenizer, units=units, vocab_size=vocab_size, max_length=max_length, target=target,
        )  # fmt: skip

    def read(self, name: str) -> str:
        split = self.files[name]
        self.hub.check_column(split, self.text, "text")
        text = "\n".join(row[self.text] or "" for row in self.hub.rows(split))
        if not text.strip():
            raise ConfigError(Problem("there is no text in this split", file=str(self.hub.place(split))))
        return text
