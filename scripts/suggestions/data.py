"""The data of the tasks: all of it comes with Python and scikit-learn. Features and targets as tensors."""

from __future__ import annotations

import ast
import sysconfig
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path

import sklearn
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_sample_images
from torch import Tensor

__all__ = [
    "Pair", "corpus", "diabetes", "digits", "documented", "gaps", "length", "lines", "noisy_digits", "painting",
    "pixels", "places", "raw_length", "standardized_diabetes", "standardized_tumors", "tumors", "windows",
]  # fmt: skip

Pair = tuple[Tensor, Tensor]

STDLIB = Path(sysconfig.get_paths()["stdlib"])
SKLEARN = Path(sklearn.__file__).parent


# -- images --------------------------------------------------------------------------------------------


@cache
def digits() -> Pair:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)  # [1797, 64], [1797]


@cache
def noisy_digits() -> Pair:
    """The same under noise: a loss that is not near zero, and so differs less from seed to seed."""
    images, labels = digits()
    return images + 0.5 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)), labels


@cache
def _photographs() -> list[Tensor]:
    return [torch.tensor(image, dtype=torch.float32) / 255 for image in load_sample_images().images]  # [427, 640, 3]


@cache
def _tiles(side: int = 8) -> list[Tensor]:
    """Both photographs cut up: [rows, columns, 3, side, side], around zero."""
    return [(photograph.unfold(0, side, side).unfold(1, side, side) - 0.5) for photograph in _photographs()]


@cache
def places() -> Pair:
    """Tiles, and which of sixteen parts each is from: two by four of either photograph."""
    tiles, labels = [], []
    for index, photograph in enumerate(_tiles()):
        rows, columns = photograph.shape[:2]
        row, column = torch.arange(rows) * 2 // rows, torch.arange(columns) * 4 // columns
        tiles.append(photograph.flatten(0, 1))
        labels.append((8 * index + 4 * row[:, None] + column).flatten())
    return torch.cat(tiles), torch.cat(labels)


@cache
def pixels() -> Pair:
    """The same with bytes as they come from a file: 0 to 255."""
    tiles, labels = places()
    return (tiles + 0.5) * 255, labels


@cache
def gaps() -> Pair:
    """Tiles whose middle, two by two, is missing, and the colors that are missing there."""
    tiles = torch.cat([photograph.flatten(0, 1) for photograph in _tiles()])
    gap = (slice(None), slice(None), slice(3, 5), slice(3, 5))
    colors = tiles[gap].flatten(1)
    tiles = tiles.clone()
    tiles[gap] = 0
    return tiles.flatten(1), colors


@cache
def painting() -> Pair:
    """Where a pixel of a photograph is, as 64 waves, and its color."""
    photograph = _photographs()[1][::4, ::4]
    rows, columns, _ = photograph.shape
    place = torch.cartesian_prod(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns))
    waves = place @ (torch.randn(2, 32, generator=torch.Generator().manual_seed(0)) * 6)
    return torch.cat([waves.sin(), waves.cos()], 1), photograph.reshape(-1, 3)


# -- text ----------------------------------------------------------------------------------------------


def _modules(*names: str) -> bytes:
    return b"".join((STDLIB / f"{name}.py").read_bytes() for name in names)


@cache
def corpus(name: str) -> bytes:
    """Text by name: code of three kinds, prose of two, and the names of characters."""
    match name:
        case "sources":
            return _modules("argparse", "ast", "inspect", "typing", "zipfile")
        case "network code":
            return _modules("smtplib", "ftplib", "imaplib", "socketserver", "ssl", "urllib/request", "http/client")
        case "scikit-learn code":
            folders = ("linear_model", "cluster", "decomposition")
            files = [path for folder in folders for path in sorted((SKLEARN / folder).glob("_*.py"))]
            return b"".join(path.read_bytes() for path in files)[:400_000]
        case "manual":
            topics = ast.parse((STDLIB / "pydoc_data" / "topics.py").read_bytes())
            strings = [node.value for node in ast.walk(topics) if isinstance(node, ast.Constant)]
            return "\n".join(text for text in strings if isinstance(text, str) and len(text) > 500).encode()[:400_000]
        case "descriptions":
            return b"".join(path.read_bytes() for path in sorted((SKLEARN / "datasets" / "descr").glob("*.rst")))
        case _:
            names = [unicodedata.name(chr(code), "") for code in range(0x2000, 0x3000)]
            return "\n".join(filter(None, names)).lower().encode()


@cache
def windows(name: str, width: int) -> Tensor:
    """Windows of a corpus, a byte a token: [count, width]."""
    tokens = torch.frombuffer(bytearray(corpus(name)), dtype=torch.uint8).long().clamp(max=127)
    count = len(tokens) // width
    return tokens[: count * width].view(count, width)


@cache
def lines(width: int = 48) -> Pair:
    """Lines of eight modules as bytes, and which module each is from."""
    names = ("tarfile", "_pydecimal", "datetime", "difflib", "turtle", "socket", "optparse", "statistics")
    rows, labels = [], []
    for label, name in enumerate(names):
        kept = [line.strip() for line in _modules(name).splitlines() if len(line.strip()) > 20][:700]
        rows += [list(line[:width].ljust(width, b"\0")) for line in kept]
        labels += [label] * len(kept)
    return torch.tensor(rows).clamp(max=127), torch.tensor(labels)


# -- tables --------------------------------------------------------------------------------------------


_NODES = (
    ast.Name, ast.Attribute, ast.Call, ast.Constant, ast.Assign, ast.AugAssign, ast.If, ast.For, ast.While, ast.Try,
    ast.With, ast.Return, ast.Raise, ast.Yield, ast.Compare, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Subscript,
    ast.Tuple, ast.List, ast.Dict, ast.ListComp, ast.Lambda, ast.JoinedStr, ast.Import, ast.Assert, ast.arg,
    ast.keyword, ast.Expr,
)  # fmt: skip


@cache
def _functions() -> tuple[Tensor, Tensor, Tensor]:
    """Functions of the standard library: counts of 30 kinds of syntax, length in lines, has it a docstring?"""
    rows, lengths, documented = [], [], []
    for path in sorted(STDLIB.glob("*.py"))[::2]:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef):
                kinds = Counter(type(inner) for inner in ast.walk(node))
                rows.append([kinds[kind] for kind in _NODES])
                lengths.append(node.end_lineno - node.lineno + 1)
                documented.append(ast.get_docstring(node) is not None)
    lines = torch.tensor(lengths, dtype=torch.float32).unsqueeze(1)
    return torch.tensor(rows, dtype=torch.float32), lines, torch.tensor(documented).long()


def standardized(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / (x.std(0) + 1e-6)


@cache
def documented() -> Pair:
    counts, _, has_docstring = _functions()
    return standardized(counts.log1p()), has_docstring


@cache
def length() -> Pair:
    counts, lines, _ = _functions()
    y = lines.log()
    return standardized(counts.log1p()), (y - y.mean()) / y.std()


def raw_length() -> Pair:
    """Counts and lines as they are: up to hundreds."""
    counts, lines, _ = _functions()
    return counts, lines


@cache
def tumors() -> Pair:
    """30 measures from 0.001 to 4,000 as they are, and benign or malignant."""
    x, y = load_breast_cancer(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


@cache
def diabetes() -> Pair:
    """Ten measures of patients as they are, and the progress of the disease, 25 to 346."""
    x, y = load_diabetes(return_X_y=True, scaled=False)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32).unsqueeze(1)


def standardized_tumors() -> Pair:
    x, y = tumors()
    return standardized(x), y


def standardized_diabetes() -> Pair:
    x, y = diabetes()
    return standardized(x), standardized(y)
