"""Two random views of every text of a batch, made from its tokens on the device."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import decoders
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fmicl_text.errors import InputError
from fmicl_text.text.checks import has_dropout
from fmicl_text.text.collator import check_max_seq_length, empty_ids
from fmicl_text.text.data import TextData, reading_errors
from fmicl_text.text.static import tokenizer_of

# The length of a crop as a share of its text. On STS-B sentences, the bundled encoder reaches 69.04 on STS-B dev with
# these, 67.23 with those of Contriever (0.1 to 0.5, arXiv 2112.09118), and 69.98 with dropout only (60 steps, one run
# each). Of paragraphs, most crops have the largest length of a view with either.
CROP_SHARES = (0.3, 0.8)
CROP_READ = 256  # tokens of a text that crops are taken from, as in Contriever, or twice the length of a view
PARAGRAPH = 64  # a median number of tokens, from which `auto` crops texts
REPEATED = 0.32  # largest share of the words that are repeated, as in ESimCSE (arXiv 2109.04380)
# The probability that a word is deleted. Without dropout, the bundled encoder reaches 69.51 on STS-B dev with it, and
# 69.26 with crops.
DELETED = 0.1

LONGEST_WORD = 16  # a longer word is cut between its tokens: a line of bytes, or of a script without spaces
# Thai, Lao, Tibetan, Burmese, Khmer, Chinese and Japanese are written without spaces between words.
WITHOUT_SPACES = re.compile("[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\ufaff\U00020000-\U0003ffff]")
# Byte-level vocabularies have parts of characters, which decode to U+FFFD.
PUNCTUATION = re.compile(r"[^\w\s\ufffd]+")


@dataclass
class Words:
    """The words of N token sequences, each padded at the end to L tokens.

    Args:
        block: Numbers of the words [N, L], counted from 0 and increasing. Each special token, token of the prompt and
            padding token is a word of its own.
        is_text: Which tokens are of the text, without special tokens, prompt and padding; bool [N, L].
        room: The number of tokens of the text that fit into a view, [N].
    """

    block: Tensor
    is_text: Tensor
    room: Tensor

    def first_token(self) -> Tensor:
        """Which tokens are the first of a word of the text; bool [N, L]."""
        new = torch.ones_like(self.is_text)
        new[:, 1:] = self.block[:, 1:] != self.block[:, :-1]
        return new & self.is_text


def same(words: Words, rand: Callable[..., Tensor]) -> Tensor:
    """Every token once."""
    return torch.ones_like(words.block)


def crops(words: Words, rand: Callable[..., Tensor]) -> Tensor:
    """A span of whole words, of a share of the text between `CROP_SHARES` and at most `room` tokens, at a random place.
    A first word that is longer than that is cut."""
    text, block, n = words.is_text, words.block, len(words.block)
    low, high = CROP_SHARES
    place = text.cumsum(1) - 1  # of a token in the text
    size = text.sum(1)
    length = ((low + (high - low) * rand(n)) * size).ceil().long()
    length = length.minimum(words.room).clamp_min(1)
    start = (rand(n) * (size - length + 1)).long()
    none = block.new_tensor(-1)
    first = torch.where(text & (place == start[:, None]), block, none).amax(1, keepdim=True)
    last = torch.where(text & (place == (start + length - 1)[:, None]), block, none).amax(1, keepdim=True)
    kept = text & (block >= first) & (block <= last)
    fits = kept & (kept.cumsum(1) <= words.room[:, None])
    cut = torch.where(kept & ~fits, block, block.max() + 1).amin(1, keepdim=True)  # the first word that does not fit
    return (~text | (fits & ((block < cut) | (cut == first)))).long()


def repeat(words: Words, rand: Callable[..., Tensor]) -> Tensor:
    """A random number of words, up to max(2, `REPEATED` of them), twice; which ones is random."""
    first = words.first_token()
    number = first.sum(1)
    most = torch.maximum((REPEATED * number).long(), number.clamp_max(2))
    chosen = (rand(len(number)) * (most + 1)).long()
    draws = torch.where(first, rand(*first.shape), 2)
    rank = draws.argsort(1).argsort(1)
    return 1 + _of_word(words, first & (rank < chosen[:, None])).long()


def delete(words: Words, rand: Callable[..., Tensor]) -> Tensor:
    """Every word with probability 1 - `DELETED`, and at least one."""
    first = words.first_token()
    draws = torch.where(first, rand(*first.shape), -1)
    kept = first & ((draws >= DELETED) | (draws == draws.amax(1, keepdim=True)))
    return (~words.is_text | _of_word(words, kept)).long()


def _of_word(words: Words, chosen: Tensor) -> Tensor:
    """Which tokens are of a word whose first token is chosen; bool [N, L]."""
    flags = torch.zeros_like(words.block).scatter_add_(1, words.block, (chosen & words.first_token()).long())
    return (flags.gather(1, words.block) > 0) & words.is_text


class TextViews:
    """Makes two random views of each text of a batch, for `FMICLTrainer(views=...)`.

    Words are deleted, repeated or cropped whole. Special tokens and the prompt stay where they are. A view has at least
    one word of the text, and at most `max_seq_length` tokens.

    Args:
        tokenizer: The encoder's tokenizer.
        views: Names in `VIEWS`, applied one after the other to each view, with draws of its own.
        max_seq_length: The largest number of tokens of a view.
        prompt: Prepended to every text.

    Attributes:
        read_length: The number of tokens that a text must be read up to, the `max_seq_length` of the collator.

    Raises:
        InputError: An unknown name, one that is given twice, `dropout` with others, a length beyond the model's
            maximum, or a prompt that leaves no token for the text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        views: Sequence[str] = ("crops",),
        max_seq_length: int = 32,
        prompt: str = "",
    ) -> None:
        check_views(views)
        check_max_seq_length(tokenizer, max_seq_length)
        empty_ids(tokenizer, max_seq_length, [prompt] if prompt else [])
        self.views, self.max_seq_length, self.prompt = tuple(views), max_seq_length, prompt
        self.read_length = max(CROP_READ, 2 * max_seq_length) if "crops" in views else max_seq_length
        self.tables = word_tables(tokenizer)
        self.prefix, self.num_last = fixed_tokens(tokenizer, prompt)
        self.left, self.cut_left = tokenizer.padding_side == "left", tokenizer.truncation_side == "left"
        self.padding = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": tokenizer.pad_token_type_id}

    def describe(self) -> dict[str, Any]:
        """Settings that are compared when training is resumed."""
        return {"views": list(self.views), "max_seq_length": self.max_seq_length, "read_length": self.read_length}

    @torch.no_grad()
    def __call__(self, tokens: Mapping[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Views [B, 2, T'] of texts.

        Args:
            tokens: input_ids, attention_mask, ... [B, 1 or 2, T], padded on either side. Two equal texts, as the
                collators make them, become one view each.
            generator: A generator on the device of the tokens. None uses the global one.
        """
        ids = tokens["input_ids"]
        shape = len(ids), 2
        if ids.ndim != 3 or ids.shape[1] > 2:
            raise InputError(f"views are made of one text per row; got token ids of shape {list(ids.shape)}")
        flat = {name: value.expand(*shape, -1).flatten(0, 1) for name, value in tokens.items()}

        def rand(*size: int) -> Tensor:
            return torch.rand(*size, generator=generator, device=ids.device)

        # `order` [N, L]: indices of the tokens of every view, `count` [N] of them.
        mask = flat["attention_mask"].bool()
        order, count = (~mask).long().argsort(dim=1, stable=True), mask.sum(1)
        for name in self.views:
            words = self.words(flat["input_ids"].gather(1, order), count)
            order, count = repeated(order, words.block, VIEWS[name](words, rand), count)
        words = self.words(flat["input_ids"].gather(1, order), count)
        order, count = repeated(order, words.block, self.fitting(words), count)
        return {name: value.unflatten(0, shape) for name, value in self.padded(flat, order, count).items()}

    def words(self, ids: Tensor, count: Tensor) -> Words:
        """The words of token ids [N, L], of which `count` [N] are not padding."""
        place = torch.arange(ids.shape[1], device=ids.device)
        begins, ends, joins = self.tables.to(ids.device)
        prefix = self.prefix[: ids.shape[1]].to(ids.device)
        num_first = (ids[:, : len(prefix)] == prefix).long().cumprod(1).sum(1)
        end = count - self.num_last
        is_text = (place >= num_first[:, None]) & (place < end[:, None])
        starts = begins[ids]
        starts[:, 1:] |= ends[ids[:, :-1]]
        starts &= ~joins[ids]
        starts |= ~is_text | (place == num_first[:, None]) | (place == end[:, None])
        block = starts.long().cumsum(1) - 1
        sizes = torch.zeros_like(block).scatter_add_(1, block, torch.ones_like(block))
        starts |= sizes.gather(1, block) > LONGEST_WORD
        room = self.max_seq_length - self.num_last - num_first
        return Words(starts.long().cumsum(1) - 1, is_text, room.clamp_min(1))

    def fitting(self, words: Words) -> Tensor:
        """Every token that fits into a view once; the others are cut as the tokenizer truncates."""
        text = words.is_text
        place = text.flip(1).cumsum(1).flip(1) if self.cut_left else text.cumsum(1)
        return (~text | (place <= words.room[:, None])).long()

    def padded(self, tokens: Mapping[str, Tensor], order: Tensor, count: Tensor) -> dict[str, Tensor]:
        """The tokens of an order, padded on the tokenizer's side to the longest."""
        longest = int(count.max())
        place = torch.arange(longest, device=order.device).expand(len(order), -1)
        place = place - (longest - count)[:, None] if self.left else place
        valid = (place >= 0) & (place < count[:, None])
        source = order.gather(1, place.clamp(0, order.shape[1] - 1))
        return {
            name: value.gather(1, source).masked_fill(~valid, self.padding.get(name, 0))
            for name, value in tokens.items()
        }


def repeated(order: Tensor, block: Tensor, copies: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """An order of tokens with each as often as `copies` says; the copies of a word follow each other.

    Args:
        order: Indices of tokens [N, L].
        block: The words of these tokens [N, L].
        copies: 0, 1 or 2 for each token [N, L].
        count: The number of tokens without padding, [N].

    Returns:
        The new order [N, L'] and the new count [N].
    """
    place = torch.arange(order.shape[1], device=order.device)
    copies = copies.where(place < count[:, None], 0)
    count = copies.sum(1)
    most = int(copies.max())
    longest = int(count.max())
    key = torch.stack([(block * 2 + k) * len(place) + place for k in range(most)], 1)  # word, copy, token
    unused = torch.stack([copies <= k for k in range(most)], 1)
    chosen = key.masked_fill(unused, torch.iinfo(torch.long).max).flatten(1).argsort(1)[:, :longest]
    return order.gather(1, chosen % len(place)), count


def choose_views(
    encoder: SentenceTransformer,
    data: TextData,
    max_seq_length: int,
    prompts: Sequence[str] = (),
    views: Sequence[str] = ("auto",),
) -> tuple[TextViews | None, str]:
    """The views of training text, and in words which they are and why.

    `auto` is `crops` if the first 1,000 texts have a median of at least `PARAGRAPH` tokens. For shorter texts it is
    `dropout` if the encoder has dropout, else `delete`. The columns of pairs are the views.

    Args:
        encoder: The encoder.
        data: The training text.
        max_seq_length: The largest number of tokens of a view.
        prompts: Prepended to the texts of each column; empty for none.
        views: See `TextViews`, or `auto`.

    Returns:
        The views, None if the collator makes them; and the words.

    Raises:
        InputError: See `TextViews`; there are several columns, and `views` is not `auto`; or a row cannot be read.
    """
    views, reason = list(views), "as given"
    if len(data.columns) > 1:
        if views != ["auto"]:
            raise InputError(f"views={' '.join(views)} applies to one text column, got {' '.join(data.columns)}")
        return None, f"the columns {' '.join(data.columns)}"
    if views == ["auto"]:
        views, reason = chosen_views(encoder, data)
    made = TextViews(tokenizer_of(encoder), views, max_seq_length, prompts[0] if prompts else "")
    return None if views == ["dropout"] else made, f"{' '.join(views)} ({reason})"


def chosen_views(encoder: SentenceTransformer, data: TextData) -> tuple[list[str], str]:
    """The names that `auto` stands for, and why."""
    with reading_errors(data.source):
        texts = [row[data.columns[0]] for row in islice(data.dataset, 1000)]
    lengths = tokenizer_of(encoder)(texts, truncation=True, max_length=CROP_READ)["input_ids"]
    median = int(np.median(list(map(len, lengths))))
    size = f"a median of {median} tokens per text"
    if median >= PARAGRAPH:
        return ["crops"], size
    if has_dropout(encoder):
        return ["dropout"], f"{size}, and the encoder has dropout"
    return ["delete"], f"{size}, and the encoder has no dropout"


def check_views(views: Sequence[str]) -> None:
    """Raise `InputError` unless the names are in `VIEWS`, each once, and `dropout` alone."""
    if isinstance(views, str) or not isinstance(views, Sequence):
        raise InputError(f"views must be a list of names, got {views!r}")
    got = " ".join(views)
    if not views or set(views) - set(VIEWS):
        raise InputError(f"views must be one or more of {', '.join(VIEWS)}; got {got or 'none'}")
    if len(set(views)) < len(views):
        raise InputError(f"views={got} names one twice")
    if "dropout" in views and len(views) > 1:
        raise InputError(f"views={got}: dropout leaves both views as they are, and is given alone")


def fixed_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[Tensor, int]:
    """The special tokens and the tokens of the prompt [P] that every text begins with, and the number of special tokens
    that it ends with."""
    text = prompt.rstrip()
    bare = tokenizer(text or "a", add_special_tokens=False)["input_ids"]
    full = tokenizer(text or "a")["input_ids"]
    first = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), 0)
    num_last = len(full) - len(bare) - first
    return torch.tensor(full[: first + len(bare) if text else first], dtype=torch.long), num_last


def word_tables(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Which tokens of a vocabulary begin a word, after which tokens a word begins, and which tokens belong to the word
    before in any case; bool [3, V].

    The pieces of WordPiece that continue a word have a mark (##); of SentencePiece and byte-level BPE, those that begin
    one (▁, Ġ); of older BPE, those that end one (</w>) or do not (@@). Without marks, a token that is a space begins a
    word (bytes, characters); without spaces, every token is a word. So is a character of a script without spaces.
    Where the marks do not tell whether there is a space, punctuation belongs to the word before.
    """
    vocabulary = tokenizer.get_vocab()
    mark = word_mark(vocabulary)
    bytes_to_text = decoders.ByteLevel()
    tables = np.zeros((3, max(vocabulary.values()) + 1), dtype=bool)
    for piece, i in vocabulary.items():
        text = bytes_to_text.decode([piece]) if mark == "Ġ" else piece
        text = text.removeprefix("##").lstrip("▁ ").removesuffix("</w>").removesuffix("@@")
        tables[0, i] = MARKS[mark](piece) or WITHOUT_SPACES.match(text) is not None
        tables[1, i] = mark in ENDS and ENDS[mark](piece)
        tables[2, i] = mark not in SPACES and PUNCTUATION.fullmatch(text) is not None
    return torch.from_numpy(tables)


def word_mark(vocabulary: Mapping[str, int]) -> str:
    """The mark of words in a vocabulary: one of `MARKS`."""
    pieces = [piece for piece in vocabulary if len(piece) > 1]
    numbers = {mark: sum(piece.startswith(mark) for piece in pieces) for mark in ("##", "▁", "Ġ")}
    numbers |= {mark: sum(piece.endswith(mark) for piece in pieces) for mark in ENDS}
    mark = max(numbers, key=lambda name: numbers[name])
    return mark if numbers[mark] else "space" if any(map(str.isspace, vocabulary)) else "none"


# Whether a piece begins a word, and whether the next piece does, by the mark of words.
MARKS: dict[str, Callable[[str], bool]] = {
    "##": lambda piece: not piece.startswith("##"),
    "▁": lambda piece: piece.startswith(("▁", "\n", "\t", "<0x0A>", "<0x09>")),
    "Ġ": lambda piece: piece.startswith(("Ġ", "Ċ", "ĉ", "č")),  # space, newline, tab, carriage return
    "</w>": lambda piece: False,
    "@@": lambda piece: False,
    "space": lambda piece: piece[:1].isspace() or piece[:1] == "▁",
    "none": lambda piece: True,
}
SPACES = ("▁", "Ġ", "space")  # the marks are spaces
ENDS: dict[str, Callable[[str], bool]] = {
    "</w>": lambda piece: piece.endswith("</w>"),
    "@@": lambda piece: not piece.endswith("@@"),
}

# `dropout`: both views are the text as it is, and the encoder's dropout makes their embeddings differ.
VIEWS: dict[str, Callable[[Words, Callable[..., Tensor]], Tensor]] = {
    "dropout": same,
    "crops": crops,
    "repeat": repeat,
    "delete": delete,
}
