"""The DuckDB catalog: views and macros over the files of a lake."""
