"""Behaviour of DuckDB that this project needs, one claim per test: read these first when an upgrade fails."""

import json
import os
import subprocess
import sys

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest


@pytest.fixture
def con():
    with duckdb.connect() as connection:
        yield connection


def rows(con, sql, *parameters):
    return con.execute(sql, list(parameters)).fetchall()


# One writer or many readers

OPEN = """
import sys, duckdb
try:
    con = duckdb.connect(sys.argv[1], read_only=sys.argv[2] == "read")
except duckdb.IOException:
    print("refused", flush=True)
else:
    print(con.execute("FROM numbers").fetchall(), flush=True)
    for _ in sys.stdin:
        print(con.execute("FROM numbers").fetchall(), flush=True)
"""


@pytest.fixture
def elsewhere(tmp_path):
    """Open `<tmp_path>/a.duckdb` in other processes; each answers one line now and one a line of input."""
    path = tmp_path / "a.duckdb"
    with duckdb.connect(str(path)) as con:
        con.execute("CREATE TABLE numbers AS SELECT 1 AS n")
    processes = []

    def start(mode):
        process = subprocess.Popen(
            [sys.executable, "-c", OPEN, str(path), mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process, process.stdout.readline().strip()

    yield path, start
    for process in processes:
        process.stdin.close()
        process.wait(timeout=60)
        process.stdout.close()


@pytest.mark.parametrize("second", ["read", "write"])
def test_a_file_open_for_writing_is_closed_to_other_processes(elsewhere, second):
    _, start = elsewhere
    assert start("write")[1] == "[(1,)]"
    assert start(second)[1] == "refused"


def test_readers_in_several_processes_get_along_and_keep_a_writer_out(elsewhere):
    _, start = elsewhere
    assert [start("read")[1], start("read")[1], start("write")[1]] == ["[(1,)]", "[(1,)]", "refused"]


def test_a_replaced_file_leaves_its_readers_on_the_old_one(elsewhere, tmp_path):
    path, start = elsewhere
    reader, _ = start("read")
    with duckdb.connect(str(tmp_path / "b.duckdb")) as con:
        con.execute("CREATE TABLE numbers AS SELECT 2 AS n")
    os.replace(tmp_path / "b.duckdb", path)
    reader.stdin.write("again\n")
    reader.stdin.flush()
    assert reader.stdout.readline().strip() == "[(1,)]"
    assert start("read")[1] == "[(2,)]"


def test_a_process_that_has_a_file_open_gets_the_old_one_again(tmp_path):
    path = tmp_path / "a.duckdb"
    for number, name in ((1, path), (2, tmp_path / "b.duckdb")):
        with duckdb.connect(str(name)) as con:
            con.execute(f"CREATE TABLE numbers AS SELECT {number} AS n")
    with duckdb.connect(str(path), read_only=True):
        os.replace(tmp_path / "b.duckdb", path)
        with duckdb.connect(str(path), read_only=True) as con:
            assert rows(con, "FROM numbers") == [(1,)]
    with duckdb.connect(str(path), read_only=True) as con:
        assert rows(con, "FROM numbers") == [(2,)]


def test_a_closed_database_is_one_file(tmp_path):
    with duckdb.connect(str(tmp_path / "a.duckdb")) as con:
        con.execute("CREATE VIEW numbers AS SELECT 1 AS n")
    assert os.listdir(tmp_path) == ["a.duckdb"]


# The parser's tree


def tree(con, predicate):
    ((text,),) = rows(con, "SELECT json_serialize_sql(?)", f"SELECT 1 WHERE (\n{predicate}\n)")
    return json.loads(text)


def test_a_parsed_predicate_stands_at_where_clause(con):
    parsed = tree(con, 'least(width, "a/b") >= 200')
    assert parsed["error"] is False
    (statement,) = parsed["statements"]
    clause = statement["node"]["where_clause"]
    assert (clause["class"], clause["left"]["class"]) == ("COMPARISON", "FUNCTION")
    assert clause["left"]["function_name"] == "least"
    assert clause["left"]["qualified_name"]["path"] == ["least"]
    arguments = [argument["expression"] for argument in clause["left"]["arguments"]]
    assert [(a["class"], a["column_names"]) for a in arguments] == [
        ("COLUMN_REF", ["width"]),
        ("COLUMN_REF", ["a/b"]),
    ]


def test_what_does_not_parse_is_told_with_a_message(con):
    parsed = tree(con, "width >")
    assert parsed["error"] is True
    assert "syntax error" in parsed["error_message"]


@pytest.mark.parametrize(
    ("predicate", "kind"),
    [
        ("EXISTS (SELECT 1)", "SUBQUERY"),
        ("row_number() OVER ()", "WINDOW"),
        ("?", "PARAMETER"),
        ("*", "STAR"),
        ("COLUMNS('a')", "STAR"),
        ("#1", "POSITIONAL_REFERENCE"),
        ("lambda x: x", "LAMBDA"),
        ("a -> 'b'", "LAMBDA"),
    ],
)
def test_nodes_that_need_more_than_a_row_have_classes_of_their_own(con, predicate, kind):
    assert tree(con, predicate)["statements"][0]["node"]["where_clause"]["class"] == kind


def test_a_lambda_tells_its_own_names_from_columns(con):
    node = tree(con, "lambda x, i: x > width")["statements"][0]["node"]["where_clause"]
    assert node["syntax_type"] == "LAMBDA_KEYWORD"
    assert {"lhs", "expr"} <= node.keys()


def test_functions_tell_their_stability(con):
    found = dict(
        rows(
            con,
            "SELECT DISTINCT function_name, stability FROM duckdb_functions() "
            "WHERE function_name IN ('least', 'random', 'now')",
        )
    )
    assert found == {"least": "CONSISTENT", "random": "VOLATILE", "now": "CONSISTENT_WITHIN_QUERY"}


# Numbers


def test_unsigned_words_compare_and_sort_beyond_the_signed_range(con):
    words = [0, 2**63 - 1, 2**63, 2**64 - 1]
    con.execute("CREATE TABLE words (f0 UBIGINT)")
    con.executemany("INSERT INTO words VALUES (?)", [[word] for word in reversed(words)])
    assert rows(con, "FROM words ORDER BY f0") == [(word,) for word in words]
    assert rows(con, f"SELECT count(*) FROM words WHERE f0 <= {2**63}::UBIGINT") == [(3,)]
    assert rows(con, "SELECT min(f0), max(f0) FROM words") == [(0, 2**64 - 1)]


def test_hexadecimal_digits_become_unsigned_words_and_back(con):
    assert rows(con, "SELECT ('0x' || 'FFFFFFFFFFFFFFFF')::UBIGINT") == [(2**64 - 1,)]
    assert rows(con, f"SELECT lower(to_hex({2**64 - 1}::UBIGINT)), lpad(to_hex(10::UBIGINT), 16, '0')") == [
        ("f" * 16, "000000000000000A")
    ]


@pytest.mark.parametrize("number", [0.1, 0.27978527545928955, 5e-324, 1.7976931348623157e308, -0.1, 1e-05])
def test_text_and_json_become_the_same_float(con, number):
    assert rows(con, f"SELECT '{number!r}'::DOUBLE") == [(number,)]
    assert rows(con, 'SELECT json_transform(?, \'{"t": "DOUBLE"}\').t', json.dumps({"t": number})) == [(number,)]


def test_both_zeros_are_equal_sort_as_equals_and_become_one_when_zero_is_added(con):
    con.execute("CREATE TABLE zeros AS SELECT * FROM (VALUES (0.0::DOUBLE, 1), (-0.0::DOUBLE, 2)) AS t(z, n)")
    assert rows(con, "SELECT count(*) FROM zeros WHERE z = 0.0") == [(2,)]
    for order in ("z, n", "z DESC, n"):
        assert rows(con, f"SELECT n FROM zeros ORDER BY {order}") == [(1,), (2,)]
    assert rows(con, "SELECT DISTINCT z::VARCHAR FROM zeros ORDER BY 1") == [("-0.0",), ("0.0",)]
    assert rows(con, "SELECT DISTINCT (z + 0.0)::VARCHAR FROM zeros") == [("0.0",)]


def test_not_a_number_and_null_are_not_finite(con):
    sql = "SELECT coalesce(isfinite(x), false) FROM (VALUES ('nan'::DOUBLE), (NULL), ('inf'), (1.0)) AS t(x)"
    assert [value for (value,) in rows(con, sql)] == [False, False, False, True]


def test_a_double_that_overflows_is_infinite_and_no_error(con):
    assert rows(con, "SELECT isinf('1e308'::DOUBLE - '-1e308'::DOUBLE)") == [(True,)]


# Files


def test_a_pattern_without_files_gives_no_rows_and_sees_files_that_come_later(con, tmp_path):
    con.execute(
        f"CREATE VIEW later AS SELECT n FROM (SELECT NULL::UBIGINT AS n WHERE false UNION ALL BY NAME "
        f"SELECT * FROM read_parquet('{tmp_path}/*.parquet', allow_empty=true))"
    )
    assert rows(con, "FROM later") == []
    rows(con, f"COPY (SELECT 7::UBIGINT AS n) TO '{tmp_path}/a.parquet'")
    assert rows(con, "FROM later") == [(7,)]


def test_a_star_matches_names_that_begin_with_a_dot_unless_the_pattern_says_no(con, tmp_path):
    for name in ("a", ".b"):
        rows(con, f"COPY (SELECT 1 AS n) TO '{tmp_path}/{name}.parquet'")
    assert len(rows(con, f"FROM read_parquet('{tmp_path}/*.parquet')")) == 2
    assert len(rows(con, f"FROM read_parquet('{tmp_path}/[!.]*.parquet')")) == 1


def test_a_path_is_a_pattern_unless_it_is_escaped(con, tmp_path):
    (tmp_path / "x[1]").mkdir()
    rows(con, f"COPY (SELECT 1 AS n) TO '{tmp_path}/x[1]/a.parquet'")
    assert rows(con, f"FROM read_parquet('{tmp_path}/x[[]1]/*.parquet')") == [(1,)]
    assert rows(con, f"FROM read_parquet('{tmp_path}/x[[]1]/a.parquet')") == [(1,)]
    with pytest.raises(duckdb.IOException, match="No files found"):
        rows(con, f"FROM read_parquet('{tmp_path}/x[1]/*.parquet')")


def test_a_positional_join_keeps_the_order_of_files_and_fills_the_shorter_with_null(con, tmp_path):
    for name, count in (("a", 300_000), ("b", 299_999)):
        rows(
            con,
            f"COPY (SELECT i AS {name} FROM range({count}) t(i)) TO '{tmp_path}/{name}.parquet' (ROW_GROUP_SIZE 20000)",
        )
    joined = f"read_parquet('{tmp_path}/a.parquet') POSITIONAL JOIN read_parquet('{tmp_path}/b.parquet')"
    assert rows(con, f"SELECT a, b FROM {joined} WHERE a IS DISTINCT FROM b") == [(299_999, None)]


def test_rows_inserted_in_order_have_ascending_rowids(con):
    con.execute("CREATE TABLE t AS SELECT i FROM range(300_000) r(i)")
    rows(con, "INSERT INTO t SELECT i + 300_000 FROM range(300_000) r(i)")
    assert rows(con, "SELECT count(*) FROM t WHERE rowid <> i") == [(0,)]


def test_an_error_is_raised_only_for_the_row_that_asks_for_it(con):
    sql = "SELECT count(*) FROM range(10) t(i) WHERE CASE WHEN i < {} THEN true ELSE error('too large') END"
    assert rows(con, sql.format(10)) == [(10,)]
    with pytest.raises(duckdb.InvalidInputException, match="too large"):
        rows(con, sql.format(9))


def test_a_result_left_open_blocks_its_connection(con):
    left_open = con.execute("SELECT 1")
    left_open.fetchone()
    with pytest.raises(duckdb.Error, match="unfinished result"):
        con.sql("SELECT 2").fetchall()


def test_a_uid_in_a_macro_reaches_the_files_as_a_filter(con, tmp_path):
    rows(
        con,
        f"COPY (SELECT i::UBIGINT AS f0, 0::UBIGINT AS f1 FROM range(100_000) t(i)) "
        f"TO '{tmp_path}/a.parquet' (ROW_GROUP_SIZE 10000)",
    )
    con.execute("CREATE MACRO word(sample, place) AS ('0x' || substr(sample, place, 16))::UBIGINT")
    con.execute(
        "CREATE MACRO find(sample) AS TABLE SELECT * FROM "
        f"(SELECT NULL::UBIGINT AS f0, NULL::UBIGINT AS f1 WHERE false UNION ALL BY NAME "
        f"SELECT * FROM read_parquet('{tmp_path}/*.parquet')) WHERE f0 = word(sample, 1) AND f1 = word(sample, 17)"
    )
    plan = rows(con, f"EXPLAIN ANALYZE FROM find('{7 << 64:032x}')")[0][1]
    assert rows(con, f"FROM find('{7 << 64:032x}')") == [(7, 0)]
    assert "Row Groups Scanned: 1 / 10" in plan


def test_an_equality_skips_row_groups_by_bloom_filters_of_arrow(con, tmp_path):
    path = tmp_path / "a.parquet"
    numbers = pa.table({"f0": pa.array(range(0, 20_000, 2), pa.uint64())})
    pq.write_table(numbers, path, row_group_size=1000, bloom_filter_options={"f0": {"ndv": 1000, "fpp": 0.001}})
    for number, groups in ((7777, 0), (7778, 1)):
        plan = rows(con, f"EXPLAIN ANALYZE SELECT * FROM '{path}' WHERE f0 = {number}")[0][1]
        assert f"Row Groups Scanned: {groups} / 10" in plan


def test_a_files_name_that_a_join_finds_opens_only_that_file(con, tmp_path):
    for name in ("a", "b", "c"):
        rows(con, f"COPY (SELECT '{name}' AS name) TO '{tmp_path}/{name}.parquet'")
    (tmp_path / "c.parquet").write_bytes(b"not parquet")
    sql = (
        "WITH found AS MATERIALIZED (SELECT '{}' AS filename WHERE random() >= 0) "
        f"SELECT name FROM read_parquet('{tmp_path}/*.parquet', filename=true) JOIN found USING (filename)"
    )
    assert rows(con, sql.format(tmp_path / "b.parquet")) == [("b",)]
    with pytest.raises(duckdb.InvalidInputException, match=r"c\.parquet"):
        rows(con, sql.format(tmp_path / "c.parquet"))


def test_a_filter_on_a_folders_name_opens_only_its_files(con, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        rows(con, f"COPY (SELECT 1 AS n) TO '{tmp_path}/{folder}/m.parquet'")
    (tmp_path / "b/m.parquet").write_bytes(b"not parquet")
    sql = (
        f"SELECT n FROM (SELECT split_part(filename, '/', -2) AS folder, n "
        f"FROM read_parquet('{tmp_path}/*/m.parquet', filename=true)) WHERE folder = 'a'"
    )
    assert rows(con, sql) == [(1,)]
