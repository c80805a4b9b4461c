-- What a version's lineage record holds, one fact a row.
CREATE MACRO lineage(subset, of_version := NULL) AS TABLE
WITH asked AS MATERIALIZED (
    SELECT record FROM lineage_records WHERE recipe = subset AND version = coalesce(
        of_version, (SELECT newest.version FROM subsets AS newest WHERE newest.recipe = subset AND newest.current))
),
facts AS (
    SELECT part, row_number() OVER () AS place, what, name, record->>name AS value
    FROM asked, (VALUES ('recipe'), ('version'), ('created'), ('rows'), ('fingerprint')) AS names(name),
        (SELECT 1 AS part, 'subset' AS what)
    UNION ALL
    SELECT 2, row_number() OVER (), 'source', name, record->'source'->>name
    FROM asked, (VALUES ('kind'), ('name'), ('version'), ('path'), ('fingerprint'), ('uids'), ('in_pool'), ('rows'),
        ('duplicates')) AS names(name)
    UNION ALL
    SELECT 2, 100 + row_number() OVER (), 'set', used.key || ' ' || names.name, used.value->>names.name
    FROM asked, json_each(record->'sets') AS used,
        (VALUES ('kind'), ('version'), ('path'), ('fingerprint'), ('uids'), ('in_pool')) AS names(name)
    UNION ALL
    SELECT 3, (value->>'step')::BIGINT, 'step', value->>'step', concat(
        value->>'text', ': ', value->>'entered', ' entered, ', value->>'kept', ' kept',
        ', threshold ' || (value->>'threshold'))
    FROM asked, json_each(record->'steps')
    UNION ALL
    SELECT 4, used.id * 1000 + input.id, 'shard', used.key || ' ' || input.key, input.value->>'$'
    FROM asked, json_each(record->'shards') AS used, json_each(used.value) AS input
    UNION ALL
    SELECT 5, left_out.id, 'shard left out', left_out.key, left_out.value->>'$'
    FROM asked, json_each(record->'shards_missing') AS left_out
    UNION ALL
    SELECT 5, 1000000000 + warning.id, 'warning', concat_ws(' ', warning.value->>'asset', warning.value->>'check'),
        concat(warning.value->>'result', ' in ' || nullif(json_array_length(warning.value->'shards'), 0) || ' shards',
            ': ', warning.value->>'why')
    FROM asked, json_each(record->'warnings') AS warning
    UNION ALL
    SELECT 5, 2000000000 + drift.id, 'drift', drift.key,
        coalesce(drift.value->'figures'->>'verdict', drift.value->>'why')
    FROM asked, json_each(record->'drift') AS drift
    UNION ALL
    SELECT part, leaf.id, what, replace(substr(leaf.fullkey, 3), '"', ''), leaf.atom->>'$'
    FROM asked, (VALUES (6, 'encoder', 'encoders'), (7, 'temperature', 'temperatures'), (8, 'parameter', 'scores'),
        (9, 'input', 'inputs'), (10, 'code', 'code_versions'), (11, 'package', 'packages'),
        (12, 'setting', 'project'), (13, 'file', 'files')) AS sections(part, what, section),
        json_tree(record->section) AS leaf
    WHERE leaf.atom IS NOT NULL
)
SELECT what, name, value FROM facts WHERE value IS NOT NULL ORDER BY part, place
