"""The demo's dataset: 1,797 real handwritten digits, one image file each, in folders by class.

They are the test part of the UCI "Optical Recognition of Handwritten Digits" data, which
scikit-learn ships: 8 x 8 pixels with 17 shades of grey, written by 13 people.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

HELD_OUT_EVERY = 5  # Each fifth digit of a class is for validation.


def samples() -> Iterator[tuple[str, bytes]]:
    """Yield key and file of each digit: "train/7/0012.pgm" or "val/7/0003.pgm", a binary PGM image."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    seen: Counter[int] = Counter()
    for image, label in zip(digits.images, digits.target, strict=True):
        number = seen[int(label)]
        seen[int(label)] += 1
        part = "val" if number % HELD_OUT_EVERY == 0 else "train"
        yield f"{part}/{label}/{number:04d}.pgm", pgm(image)


def pgm(image: Any) -> bytes:
    """Return a binary PGM file with the 8 x 8 array *image* of values from 0 to 16."""
    height, width = image.shape
    pixels: bytes = image.astype("uint8").tobytes()
    return f"P5\n{width} {height}\n16\n".encode() + pixels


def upload(client: Any, bucket: str, prefix: str) -> tuple[int, int]:
    """Put every sample under *prefix*; return how many files and bytes. Raises what boto3 raises."""

    def put(sample: tuple[str, bytes]) -> int:
        key, body = sample
        client.put_object(Bucket=bucket, Key=f"{prefix}/{key}", Body=body)
        return len(body)

    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(put, samples()))
    return len(sizes), sum(sizes)
