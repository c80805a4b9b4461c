-- The versions of a subset, oldest first.
CREATE MACRO versions(subset) AS TABLE
SELECT version, created, current, rows, source_rows, rows / source_rows AS of_source,
    concat_ws(' ', source_name, source_version) AS source, shards, shards_missing, fingerprint
FROM subsets WHERE recipe = subset ORDER BY length(version), version
