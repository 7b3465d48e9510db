"""Train a classifier on a folder of images, DATA/train/CLASS/*.pgm, checked on DATA/val.

An ordinary training script: it lists a folder, shuffles the files anew for each epoch, and several
loader processes open and read them. Where the folder comes from is none of its business.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import pickle
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.neural_network import MLPClassifier

BATCH_FILES = 32

Sample = tuple[str, int]  # Path and class.


def list_samples(folder: Path) -> list[Sample]:
    """Return the images below *folder*, whose subfolders are the classes, sorted by path."""
    return [(str(path), int(path.parent.name)) for path in sorted(folder.glob("*/*.pgm"))]


def read_image(path: str) -> tuple[Any, int]:
    """Return the pixels of a binary PGM image as floats from 0 to 1, and the file's size in bytes."""
    with open(path, "rb") as file:
        data = file.read()
    magic, size, shades, pixels = data.split(b"\n", 3)
    width, height = map(int, size.split())
    if magic != b"P5" or len(pixels) != width * height:
        raise ValueError(f"{path}: no binary PGM image, or not a whole one")
    return np.frombuffer(pixels, np.uint8) / float(shades), len(data)


def load_batch(batch: Sequence[Sample]) -> tuple[Any, Any, int]:
    """Return images (files x pixels), classes, and the bytes read. Runs in a loader process."""
    images, sizes = zip(*(read_image(path) for path, _ in batch), strict=True)
    return np.stack(images), np.array([label for _, label in batch]), sum(sizes)


class Loader:
    """Reads samples with several processes, in batches, in the given order."""

    def __init__(self, processes: int) -> None:
        self._pool = multiprocessing.Pool(processes)
        self.files_read = 0
        self.bytes_read = 0

    def batches(self, samples: Sequence[Sample]) -> Iterator[tuple[Any, Any]]:
        parts = [samples[i : i + BATCH_FILES] for i in range(0, len(samples), BATCH_FILES)]
        for images, labels, size_bytes in self._pool.imap(load_batch, parts):
            self.files_read += len(labels)
            self.bytes_read += size_bytes
            yield images, labels

    def close(self) -> None:
        self._pool.terminate()
        self._pool.join()


def train_epoch(model: MLPClassifier, loader: Loader, samples: Sequence[Sample]) -> None:
    for images, labels in loader.batches(samples):
        model.partial_fit(images, labels, classes=range(10))


def accuracy(model: MLPClassifier, loader: Loader, samples: Sequence[Sample]) -> float:
    right = sum(int((model.predict(images) == labels).sum()) for images, labels in loader.batches(samples))
    return right / len(samples)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a classifier on a folder of images.")
    parser.add_argument("data", type=Path, help="folder with train/CLASS/*.pgm and val/CLASS/*.pgm")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--loaders", type=int, default=4, help="loader processes")
    parser.add_argument("--accuracy", type=float, default=0.0, help="fail below this one")
    parser.add_argument("--checkpoint", type=Path, help="go on from here when it exists, and save here")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def save(model: Any, checkpoint: Path) -> None:
    """Write beside the last checkpoint, and rename over it once the bytes are on the disk."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    unfinished = checkpoint.with_suffix(".tmp")
    with open(unfinished, "wb") as file:
        pickle.dump(model, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, checkpoint)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    training, validation = list_samples(arguments.data / "train"), list_samples(arguments.data / "val")
    if not training or not validation:
        print(f"{arguments.data}: no images under train/ or val/", file=sys.stderr)
        return 1
    model = MLPClassifier(hidden_layer_sizes=(64,), learning_rate_init=0.005, random_state=arguments.seed)
    if arguments.checkpoint and arguments.checkpoint.exists():
        model = pickle.loads(arguments.checkpoint.read_bytes())
    shuffler = random.Random(arguments.seed)
    loader = Loader(arguments.loaders)
    reached = 0.0
    try:
        for epoch in range(1, arguments.epochs + 1):
            start_s = time.perf_counter()
            shuffler.shuffle(training)
            train_epoch(model, loader, training)
            reached = accuracy(model, loader, validation)
            seconds = time.perf_counter() - start_s
            read = f"{loader.files_read} files {loader.bytes_read} bytes"
            print(f"epoch {epoch}: {seconds:.2f} s, accuracy {reached:.3f}, read {read}", flush=True)
            loader.files_read = loader.bytes_read = 0
    finally:
        loader.close()
    if arguments.checkpoint:
        save(model, arguments.checkpoint)
    if reached < arguments.accuracy:
        print(f"accuracy {reached:.3f} is below {arguments.accuracy:.3f}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
