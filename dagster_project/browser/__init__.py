"""`clip-select browse`: pages over a project's lake and pool, and the queries behind them."""
