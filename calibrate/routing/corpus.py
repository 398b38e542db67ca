"""Text for training, by domain: what the machine has, and what the user names.

The text stays where it is: only which experts its bytes chose goes into a trace, with this provenance.
"""

from __future__ import annotations

import gzip
import html
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError

__all__ = ["Corpus", "Domain", "find_corpus", "read_text"]

N_BYTES = 256
"""Tokens of the vocabulary: bytes."""
_HELD_OUT_EVERY = 10
_FILE_BYTES = 200_000
_BETWEEN = b"\n\0"


@dataclass(frozen=True, eq=False)
class Domain:
    """One kind of text, cut into a part to learn from and one held out.

    Parameters
    ----------
    name
        Short name.
    source, licence
        What was read and on what terms.
    train, held_out : (n_bytes,), uint8
        Documents one behind the other. Every tenth document is held out, whole.
    """

    name: str
    source: str
    licence: str
    train: NDArray[np.uint8]
    held_out: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Corpus:
    """Domains of text, drawn from with equal weight."""

    domains: tuple[Domain, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the domains."""
        return tuple(domain.name for domain in self.domains)

    def draw(self, rng: np.random.Generator, n_sequences: int, length: int) -> NDArray[np.int64]:
        """Draw training windows (n_sequences, length): every domain equally likely, any start."""
        which = rng.integers(len(self.domains), size=n_sequences)
        at = rng.random(n_sequences)
        rows = []
        for domain, u in zip(which, at, strict=True):
            text = self.domains[domain].train
            start = int(u * (text.size - length + 1))
            rows.append(text[start : start + length])
        return np.stack(rows).astype(np.int64)

    def held_out(self, n_sequences: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Held-out windows, the same number of each domain, evenly spaced over its text.

        Returns
        -------
        windows : (n_sequences, length), int64
            Bytes; `n_sequences` rounded up to a multiple of the domains. Domains take turns.
        domains : (n_sequences,), uint8
            Domain of each window.
        """
        each = -(-n_sequences // len(self.domains))
        rows, of = [], []
        for turn in range(each):
            for index, domain in enumerate(self.domains):
                start = (domain.held_out.size - length) * turn // max(1, each - 1)
                rows.append(domain.held_out[start : start + length])
                of.append(index)
        return np.stack(rows).astype(np.int64), np.array(of, dtype=np.uint8)


def _plain(file: Path) -> bytes:
    return file.read_bytes()


def _unzipped(file: Path) -> bytes:
    return gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()


def _main_text(file: Path) -> bytes:
    """Words of an HTML page's main part, tags taken out."""
    found = re.search(r"<main>(.*)</main>", file.read_text(encoding="utf-8"), re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", "", found[1])).strip().encode() if found else b""


@dataclass(frozen=True)
class _Place:
    """Where a domain stands on a machine, as its packages install it."""

    name: str
    root: Path
    patterns: tuple[str, ...]
    source: str
    licence: str
    read: Callable[[Path], bytes] = _plain
    without: tuple[str, ...] = ()

    def documents(self) -> Iterator[bytes]:
        files = sorted({file for pattern in self.patterns for file in self.root.glob(pattern)})
        for file in files:
            if file.is_file() and not file.is_symlink() and not set(self.without) & set(file.parts):
                yield self.read(file)


def _places() -> tuple[_Place, ...]:
    manual = Path("/usr/share/man")
    l10n = "GPL-3.0-or-later (manpages-l10n), else each page's own"
    guides = tuple(f"*/share/doc/rust/html/{book}/**/*.html" for book in ("book", "reference", "nomicon"))
    return (
        _Place(
            "python",
            Path(sysconfig.get_path("stdlib")),
            ("**/*.py",),
            "Python's standard library, source and docstrings",
            "PSF-2.0",
            without=("site-packages", "test", "tests", "lib2to3", "idlelib"),
        ),
        _Place(
            "c",
            Path("/usr/include/linux"),
            ("**/*.h",),
            "Linux's user headers",
            "GPL-2.0 WITH Linux-syscall-note",
        ),
        _Place(
            "javascript",
            Path("/usr/lib/node_modules/npm"),
            ("lib/**/*.js", "node_modules/**/*.js"),
            "npm and the packages bundled with it",
            "Artistic-2.0 (npm), MIT, ISC, BSD and Apache-2.0 (bundled)",
        ),
        _Place(
            "perl",
            Path("/usr/share/perl"),
            ("5*/**/*.pm",),
            "Perl's standard library",
            "Artistic-1.0-Perl OR GPL-1.0+",
        ),
        _Place(
            "guide",
            Path.home() / ".rustup" / "toolchains",
            guides,
            "The Rust Programming Language, Reference and Nomicon, English prose",
            "MIT OR Apache-2.0",
            read=_main_text,
        ),
        _Place(
            "manual",
            manual,
            ("man[1258]/*",),
            "manual pages, English",
            "each page's own (GPL, BSD, MIT, ...)",
            read=_unzipped,
        ),
        _Place("german", manual, ("de/man*/*",), "manual pages, German", l10n, read=_unzipped),
        _Place("french", manual, ("fr/man*/*",), "manual pages, French", l10n, read=_unzipped),
    )


def _domain(name: str, source: str, licence: str, documents: Iterable[bytes], limit: int) -> Domain | None:
    """Join documents up to `limit` bytes; None where there are too few to hold some out."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    seen: set[bytes] = set()
    total = 0
    for text in documents:
        text = text[:_FILE_BYTES]
        if len(text) < 200 or b"\0" in text or text in seen:
            continue
        held_out = len(seen) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
        seen.add(text)
        parts[held_out].append(text)
        total += len(text)
        if total > limit:
            break
    if not parts[1]:
        return None
    train, held_out_text = (np.frombuffer(_BETWEEN.join(part), dtype=np.uint8) for part in parts)
    return Domain(name, source, licence, train, held_out_text)


def find_corpus(*, limit: int = 4_000_000, only: Iterable[str] | None = None) -> Corpus:
    """Text of several domains, as far as this machine has it.

    Parameters
    ----------
    limit
        Bytes read of each domain at most; files in the order of their paths.
    only
        Domains wanted; all where None.

    Raises
    ------
    TraceError
        If a wanted domain is unknown, or nothing is found.
    """
    places = {place.name: place for place in _places()}
    wanted = list(only) if only is not None else list(places)
    if unknown := [name for name in wanted if name not in places]:
        fix = f"one of {', '.join(places)}, or --text DOMAIN=PATH"
        raise TraceError("no such domain of text", value=unknown[0], fix=fix)
    found = (
        _domain(name, place.source, place.licence, place.documents(), limit)
        for name, place in ((name, places[name]) for name in wanted)
    )
    domains = tuple(domain for domain in found if domain is not None)
    if not domains:
        raise TraceError("no text found on this machine", fix="give --text DOMAIN=PATH")
    return Corpus(domains)


def read_text(texts: Mapping[str, str | Path], *, limit: int = 4_000_000) -> Corpus:
    """Text that the user names.

    Parameters
    ----------
    texts
        File or folder (every file below it) by domain. One file is cut into pieces of 4096 bytes, of which
        every tenth is held out.
    limit
        Bytes of each domain at most.

    Raises
    ------
    TraceError
        If a path is absent or holds too little text to hold some out.
    """
    domains = []
    for name, where in texts.items():
        path = Path(where)
        if path.is_dir():
            documents: Iterable[bytes] = (
                file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()
            )
        elif path.is_file():
            documents = _pieces(path.read_bytes()[:limit])
        else:
            raise TraceError("no such file or folder of text", value=str(path), place=f"--text {name}")
        domain = _domain(name, path.name, "as its owner says", documents, limit)
        if domain is None:
            rule = "needs ten documents, or one file of 40 kB, without zero bytes"
            raise TraceError(rule, value=str(path), place=f"--text {name}", fix="give more text")
        domains.append(domain)
    return Corpus(tuple(domains))


def _pieces(text: bytes, size: int = 4096) -> Iterator[bytes]:
    return (text[start : start + size] for start in range(0, len(text), size))
