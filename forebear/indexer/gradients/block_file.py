"""Arrow files of named tensors, one record batch for each block of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import torch

from forebear.errors import CorruptIndexError, is_out_of_memory
from forebear.indexer.model.device.copies import as_tensor
from forebear.indexer.model.scopes import Block
from forebear.indexer.storage.arrow import MEND, read_batches, write_table

BlockTensors = dict[str, torch.Tensor]  # by field name


def write_blocks(path: Path, parts: Mapping[Block, BlockTensors], metadata: dict[str, str]) -> None:
    """Write matrices of each block as float32, atomically."""
    fields = list(next(iter(parts.values())))
    columns = [("name", pa.string()), ("kind", pa.string()), ("bias", pa.bool_()), ("shape", pa.list_(pa.int64()))]
    columns.append(("window", pa.int64()))
    for field in fields:
        columns += [(field, pa.large_list(pa.float32())), (f"{field}_width", pa.int64())]
    schema = pa.schema(columns, metadata=metadata)

    def batches() -> Iterator[pa.RecordBatch]:
        for block, tensors in parts.items():
            values = [pa.array([block.name]), pa.array([block.kind]), pa.array([block.bias])]
            values.append(pa.array([[block.n_out, block.n_in]], pa.list_(pa.int64())))
            values.append(pa.array([block.window]))
            for field in fields:
                flat = tensors[field].float().cpu().contiguous().numpy().reshape(-1)
                values.append(pa.LargeListArray.from_arrays(pa.array([0, len(flat)], pa.int64()), pa.array(flat)))
                values.append(pa.array([tensors[field].shape[1]]))
            yield pa.RecordBatch.from_arrays(values, schema=schema)

    write_table(path, batches(), schema)


def read_blocks(path: Path) -> tuple[dict[Block, BlockTensors], dict[str, str]]:
    """Memory-map what :func:`write_blocks` wrote, in the order of writing, and its metadata.

    Raises:
        CorruptIndexError: It is no such file.
    """
    batches = read_batches(path)
    parts: dict[Block, BlockTensors] = {}
    try:
        schema = batches[0].schema
        fields = [name for name in schema.names if f"{name}_width" in schema.names]
        for batch in batches:
            value = {name: batch.column(name)[0].as_py() for name in ("name", "kind", "bias", "shape")}
            tensors = {}
            for field in fields:
                flat = as_tensor(batch.column(field).values.to_numpy(zero_copy_only=True))
                tensors[field] = flat.view(-1, batch.column(f"{field}_width")[0].as_py())
            n_out, n_in = value["shape"]
            window = batch.column("window")[0].as_py() if "window" in schema.names else 1  # older indexes have none
            parts[Block(value["name"], value["kind"], n_out, n_in, value["bias"], window)] = tensors
        return parts, {k.decode(): v.decode() for k, v in (schema.metadata or {}).items()}
    except (KeyError, IndexError, RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise CorruptIndexError(f"{path} does not hold what an index keeps there ({error}). {MEND}") from error
