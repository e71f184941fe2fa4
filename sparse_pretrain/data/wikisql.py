"""WikiSQL (Zhong et al. 2017): a question about a table, and the SQL query that answers it, as text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparse_pretrain.data.rows import Row, json_rows
from sparse_pretrain.errors import UserError

AGGREGATIONS = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
COMPARISONS = ("=", ">", "<", "OP")
ALLOWED = "WikiSQL's NAME.jsonl with NAME.tables.jsonl beside it: {question, table_id, sql: {sel, agg, conds}}"


def wikisql_rows(paths: list[Path], option: str) -> Iterator[Row]:
    """The examples of WikiSQL's files, each with its table's header: {question, sql, table: {header}}.

    Raises:
        UserError: naming `option`, if a file is not of that format or its tables are not there.
    """
    for path in paths:
        tables = tables_of(path, option)
        try:
            headers = {table["id"]: table["header"] for table in json_rows(tables, option)}
            for row in json_rows(path, option):
                yield {**row, "table": {"header": headers[row["table_id"]]}}
        except KeyError as error:
            raise UserError(option, f"{path} or its tables, without {error}", ALLOWED) from error


def tables_of(path: Path, option: str) -> Path:
    """The file of the tables that the questions in `path` are about.

    Raises:
        UserError: naming `option`, if it is not there.
    """
    name, suffix, compression = path.name.partition(".jsonl")
    tables = path.with_name(f"{name}.tables.jsonl{compression}")
    if not suffix or not tables.is_file():
        raise UserError(option, f"{path}, without {tables.name} beside it", ALLOWED)
    return tables


def as_texts(row: Row) -> tuple[str, str]:
    """The question with the names of the columns, and the query, as the data set's own readable form has it:
    `SELECT COUNT Player FROM table WHERE Position = guard AND No. > 3`.

    Raises:
        UserError: naming data.format, if the row is not WikiSQL's.
    """
    try:
        header, sql = row["table"]["header"], row["sql"]
        aggregation, selected = AGGREGATIONS[sql["agg"]], header[sql["sel"]]
        conditions = [f"{header[c]} {COMPARISONS[o]} {value}" for c, o, value in _conditions(sql["conds"])]
        question = row["question"]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError("data.format", f"wikisql, with a row that is not ({error})", ALLOWED) from error
    query = f"SELECT {aggregation} {selected} FROM table"
    if conditions:
        query += f" WHERE {' AND '.join(conditions)}"
    return f"{question} | {' | '.join(header)}", " ".join(query.split())


def _conditions(conditions: Any) -> list[tuple[int, int, Any]]:
    """As triples; Hugging Face's copy has them as three lists."""
    if isinstance(conditions, dict):
        names = ("column_index", "operator_index", "condition")
        return list(zip(*(conditions[name] for name in names), strict=True))
    return conditions
