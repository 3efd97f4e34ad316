"""Models as directories in the formats of others: GPTQ, and compressed-tensors with its zeros left out."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from gossamer.checkpoint.bitmask import packed_bits
from gossamer.checkpoint.codes import CodedTensor
from gossamer.checkpoint.gptq import write_gptq
from gossamer.checkpoint.hub import read_config, read_quantization
from gossamer.checkpoint.model_writer import copy_beside, from_checkpoint, write_config, write_weights
from gossamer.checkpoint.opening import open_checkpoint
from gossamer.checkpoint.packed import PackedCheckpoint
from gossamer.checkpoint.safetensors import DTYPES, Checkpoint
from gossamer.checkpoint.safetensors_writer import LazyTensor
from gossamer.errors import ConfigError
from gossamer.export.exported import Exported

__all__ = ["write_bitmask_directory", "write_gptq_directory"]

Progress = Callable[[int, int], None]
_LEAST = 0.4  # share of zeros from which leaving them out pays: a bit for each number is added


def write_gptq_directory(
    path: Path,
    directory: Path,
    *,
    type: str,
    name: str = "model",
    force: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """A GPTQ checkpoint of a model whose matrices are int4, or uint4, of one group: its integers as they are.

    Raises ConfigError for a model of floats and a target that is there, CheckpointError for what GPTQ cannot
    hold.
    """
    source = open_checkpoint(directory)
    coded = {
        tensor: CodedTensor(
            format=stored[0],
            group=stored[1],
            shape=(source.info(tensor).shape[0], source.info(tensor).shape[1]),
            make=lambda tensor=tensor: source.read_codes(tensor, 0, source.info(tensor).shape[0]),  # type: ignore[misc]
        )
        for tensor in source.names()
        if (stored := source.stored(tensor))[0] != "f32"
    }
    if not coded or not isinstance(source, PackedCheckpoint):
        raise ConfigError(
            f"{name} holds floats, and GPTQ integers of 4 bits; make them first: `gossamer compress {name} "
            "--recipe int4-gptq --text FILE -o DIR`, then export DIR"
        )
    floats = from_checkpoint(source, [tensor for tensor in source.names() if tensor not in coded])
    with _target(path, force) as part:
        size = write_gptq(part, read_config(directory), floats, coded)
        copy_beside(directory, part)
    kinds = Counter(t.format for t in coded.values()) + Counter(t.dtype for t in floats.values())
    return Exported(path=path, bytes=size, tensors=dict(kinds), kept=len(coded), notes=[])


def write_bitmask_directory(
    path: Path,
    directory: Path,
    *,
    type: str,
    name: str = "model",
    force: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """The model as it is, but matrices of its layers that are at least two fifths zeros as bits that say
    where the others are, and these ("sparse-bitmask").

    Raises ConfigError for a model without such a matrix and a target that is there, CheckpointError for one
    whose weights are not safetensors.
    """
    source = Checkpoint(directory)
    tensors = from_checkpoint(source)
    kept = []
    for tensor, lazy in from_checkpoint(source).items():
        if len(lazy.shape) == 2 and tensor.endswith(".weight") and ".layers." in tensor:
            array = source.read(tensor)
            count = int(np.count_nonzero(array))
            if count <= (1 - _LEAST) * array.size:
                del tensors[tensor]
                tensors |= _sparse(source, tensor, count)
                kept.append(tensor.removesuffix(".weight"))
            source.release(tensor)
    if not kept:
        raise ConfigError(
            f"{name} has no matrix in its layers of which {_LEAST:.0%} are zero; prune it first: `gossamer "
            'compress` with a step prune = "sparsegpt"'
        )
    settings = read_quantization(directory) or {"quant_method": "compressed-tensors", "config_groups": {}}
    if settings.get("quant_method") != "compressed-tensors":
        raise ConfigError(
            f"{name} is quantized as {settings.get('quant_method')}, and bitmasks belong to "
            "compressed-tensors; export the model that it was made of"
        )
    sparsity = {
        "format": "sparse-bitmask", "targets": sorted(kept), "ignore": [],
        "sparsity_structure": "unstructured",
    }  # fmt: skip
    with _target(path, force) as part:
        size = write_weights(part, tensors)
        config = {**read_config(directory), "quantization_config": {**settings, "sparsity_config": sparsity}}
        write_config(part, config)
        copy_beside(directory, part)
    plain = Counter(t.dtype for t in tensors.values())
    notes = ["compressed-tensors reads this layout up to release 0.14; later ones have left it out"]
    return Exported(path=path, bytes=size, tensors=dict(plain), kept=len(kept), notes=notes)


def _sparse(source: Checkpoint, name: str, count: int) -> dict[str, LazyTensor]:
    """The parts of a sparse tensor, in the layout of `gossamer.checkpoint.bitmask`."""
    info = source.info(name)
    n, k = info.shape

    def offsets() -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        counts = np.count_nonzero(source.read(name), axis=1)
        return np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)

    def values() -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
        array = source.read(name)
        return np.asarray(array[array != 0], DTYPES[info.dtype])

    return {
        f"{name}.shape": LazyTensor("I64", (2,), lambda: np.array([n, k], np.int64)),
        f"{name}.compressed": LazyTensor(info.dtype, (count,), values),
        f"{name}.bitmask": LazyTensor("U8", (n, -(-k // 8)), lambda: packed_bits(source.read(name) != 0)),
        f"{name}.row_offsets": LazyTensor("I64", (n,), offsets),
    }


@contextmanager
def _target(path: Path, force: bool) -> Iterator[Path]:
    """A directory beside the target to fill, which takes its place once it is whole."""
    if path.exists() and not force:
        raise ConfigError(f"{path} exists already; choose another -o, or pass --force to replace it")
    part = path.parent / f".{path.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if path.is_dir():
            shutil.rmtree(path)
        part.replace(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
