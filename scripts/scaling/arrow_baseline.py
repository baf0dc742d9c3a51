"""What `data prepare` is held against: one process that sorts and groups one shard set with Arrow.

Usage: python scripts/scaling/arrow_baseline.py FOLDER ROWS      prints JSON

Reads shards of `interactions/` up to so many rows, sorts them by user and time, and gathers each
user's items and times in lists, on one thread. Nothing is checked, indexed or written.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def main() -> None:
    """Prints rows, seconds and rows per second."""
    folder, limit = Path(sys.argv[1]), int(sys.argv[2])
    pa.set_cpu_count(1)
    start, begun = time.perf_counter(), time.process_time()
    table = read(folder, limit)
    ordered = table.sort_by([("user_id", "ascending"), ("timestamp", "ascending")])
    groups = ordered.group_by("user_id", use_threads=False)
    users = groups.aggregate([("item_id", "list"), ("timestamp", "list")])
    seconds, cpu = time.perf_counter() - start, time.process_time() - begun
    rows = table.num_rows
    found = {"rows": rows, "users": users.num_rows, "seconds": round(seconds, 2)}
    rates = {"rows_per_s": round(rows / seconds), "rows_per_cpu_s": round(rows / cpu)}
    print(json.dumps({**found, **rates}))


def read(folder: Path, limit: int) -> pa.Table:
    """The first shards that together hold no more than the limit, at least one."""
    parts: list[pa.Table] = []
    for path in sorted((folder / "interactions").glob("*.parquet")):
        if parts and sum(part.num_rows for part in parts) + pq.read_metadata(path).num_rows > limit:
            break
        parts.append(pq.read_table(path, use_threads=False))
    return pa.concat_tables(parts)


if __name__ == "__main__":
    main()
