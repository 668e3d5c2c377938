"""The part of the work that one task of an array does, written `shard=i/n`, and the files that it alone writes."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Shard(NamedTuple):
    """Part `number` of `count`; 0 of 1 is all of the work."""

    number: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read "i/n", with i from 0 to n - 1.

        Raises:
            ValueError: the text is not of this form.
        """
        number, slash, count = text.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise ValueError(f"expected shard as i/n with i from 0 to n - 1, such as 0/8, got {text!r}")
        return cls(int(number), int(count))

    def has(self, name: str) -> bool:
        """Whether a mesh belongs to this part. It follows from the name, so a growing folder keeps its parts."""
        digest = hashlib.blake2s(name.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % self.count == self.number

    def of(self, items: Sequence) -> Sequence:
        """Every n-th item, from the i-th on."""
        return items[self.number :: self.count]

    def file(self, path: str | Path) -> Path:
        """Return `path` where there is one part, else this part's own file: index.json -> index.0-of-8.json."""
        path = Path(path)
        own = f"{path.stem}.{self.number}-of-{self.count}{path.suffix}"
        return path if self.count == 1 else path.with_name(own)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"
