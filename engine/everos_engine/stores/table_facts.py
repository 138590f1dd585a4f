"""Look at the tables on disk for `doctor` and `explain`, with or without a running engine. Changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lancedb import AsyncConnection

from everos_engine.errors import Transient
from everos_engine.stores import lance
from everos_engine.stores.lance import TableKind


@dataclass(frozen=True, slots=True)
class Examination:
    """One table as it is on disk.

    ``error`` is set if it cannot be opened, read and searched, ``drift`` if its columns are not ours.
    """

    kind: str
    error: str = ""
    drift: str = ""
    incarnation: str = ""
    model: str = ""
    dimension: int = 0
    version: int = 0
    rows: int = 0


async def examine(directory: Path, kinds: Mapping[str, TableKind]) -> list[Examination]:
    """Look at every table there is, on a separate connection and on the current asyncio loop."""
    present = [kind for kind in kinds if (directory / f"{kind}.lance").is_dir()]
    if not present:
        return []
    async with lance.looking(directory) as connection:
        return [await _examined(connection, directory, kinds[kind]) for kind in present]


async def count_of(directory: Path, kind: str, md_path: str) -> int:
    """Return the rows of one path in the table itself, counted as ``examine`` looks. It is 0 if there is no table."""
    if not (directory / f"{kind}.lance").is_dir():
        return 0
    async with lance.looking(directory) as connection:
        table = await connection.open_table(kind)
        try:
            return int(await table.count_rows(f"md_path = {lance.text_literal(md_path)}"))
        finally:
            table.close()


async def _examined(connection: AsyncConnection, directory: Path, kind: TableKind) -> Examination:
    """Look at one table. One that is ours is read whole, and searched once for each of its indexes."""
    try:
        with lance.sorted_troubles():
            table = await connection.open_table(kind.name)
            try:
                schema, version, rows = await table.schema(), await table.version(), await table.count_rows()
            finally:
                table.close()
            if lance.identity_of(schema).incarnation:
                await lance.probe(directory, kind, lance.PROBE_WORD)
    except Transient as error:
        return Examination(kind.name, error=str(error))
    identity = lance.identity_of(schema)
    wanted = lance.schema_of(kind, lance.Model("", 0), "")
    missing = [name for name in wanted.names if name not in schema.names]
    extra = [name for name in schema.names if name not in wanted.names and name != "vector"]
    other = [
        name for name in wanted.names if name in schema.names and schema.field(name).type != wanted.field(name).type
    ]
    drift = f"missing={missing}, extra={extra}, of another type={other}" if missing or extra or other else ""
    return Examination(
        kind.name,
        drift=drift,
        incarnation=identity.incarnation,
        model=identity.model.name,
        dimension=identity.model.dimension,
        version=version,
        rows=rows,
    )
