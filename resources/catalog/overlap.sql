-- How many rows the newest versions of two subsets share.
CREATE MACRO overlap(a, b) AS TABLE
WITH members AS (
    SELECT recipe, f0, f1 FROM subset_members
    SEMI JOIN (FROM subsets WHERE current) AS newest USING (recipe, version)
),
counted AS (
    SELECT (SELECT count(*) FROM members WHERE recipe = a) AS rows_a,
        (SELECT count(*) FROM members WHERE recipe = b) AS rows_b,
        (SELECT count(*) FROM (SELECT f0, f1 FROM members WHERE recipe = a)
            SEMI JOIN (SELECT f0, f1 FROM members WHERE recipe = b) AS other USING (f0, f1)) AS rows_both
)
SELECT *, rows_both / nullif(rows_a + rows_b - rows_both, 0) AS jaccard FROM counted
