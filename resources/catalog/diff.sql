-- The rows that differ between two versions of a subset, each with the reason.
-- {folder} is the folder of all subsets, as an SQL string that ends in a slash.
CREATE MACRO diff(subset, a, b) AS TABLE
WITH steps AS MATERIALIZED (
    SELECT version, step, kind, text, score, scores, value, set, threshold, tie_uid, file FROM funnel
    WHERE recipe = subset AND version IN (a, b)
),
sources AS MATERIALIZED (
    SELECT version, source_kind AS kind, source_name AS name FROM subsets
    WHERE recipe = subset AND version IN (a, b)
),
-- A row is `here` in the version that has it, and the question is what kept it out `there`.
changed AS (
    SELECT 'left' AS change, a AS here, b AS there, m.uid, m.f0, m.f1, m.shard, m.key, to_json(m) AS figures
    FROM read_parquet({folder} || subset || '/' || a || '/manifest.parquet') AS m
    WHERE NOT EXISTS (
        SELECT 1 FROM read_parquet({folder} || subset || '/' || b || '/manifest.parquet') AS other
        WHERE other.f0 = m.f0 AND other.f1 = m.f1)
    UNION ALL
    SELECT 'entered', b, a, m.uid, m.f0, m.f1, m.shard, m.key, to_json(m)
    FROM read_parquet({folder} || subset || '/' || b || '/manifest.parquet') AS m
    WHERE NOT EXISTS (
        SELECT 1 FROM read_parquet({folder} || subset || '/' || a || '/manifest.parquet') AS other
        WHERE other.f0 = m.f0 AND other.f1 = m.f1)
),
-- The uids of the recipes and uid lists that a version read, under the names that its recipe calls them by.
set_files AS MATERIALIZED (
    SELECT version, read->>'name' AS name, read->>'file' AS file
    FROM lineage_records, (
        SELECT record->'source' AS read UNION ALL SELECT used.value FROM json_each(record->'sets') AS used)
    WHERE recipe = subset AND version IN (a, b) AND file IS NOT NULL
),
listed AS (
    SELECT there, name, f0, f1 FROM (
        SELECT NULL::VARCHAR AS there, NULL::VARCHAR AS filename, NULL::UBIGINT AS f0, NULL::UBIGINT AS f1 WHERE false
        UNION ALL BY NAME SELECT a AS there, * FROM read_parquet(
            {folder} || subset || '/' || a || '/sets/[!.]*.parquet', allow_empty = true, filename = true)
        UNION ALL BY NAME SELECT b AS there, * FROM read_parquet(
            {folder} || subset || '/' || b || '/sets/[!.]*.parquet', allow_empty = true, filename = true)
    ) JOIN set_files ON there = version AND ends_with(filename, '/' || file)
),
-- The rows that a version dropped because a better one was like them, with the uid of that one.
alike AS (
    SELECT there, step, f0, f1, format('{:016x}{:016x}', kept_f0, kept_f1) AS in_favour_of FROM (
        SELECT NULL::VARCHAR AS there, NULL::VARCHAR AS filename, NULL::UBIGINT AS f0, NULL::UBIGINT AS f1,
            NULL::UBIGINT AS kept_f0, NULL::UBIGINT AS kept_f1 WHERE false
        UNION ALL BY NAME SELECT a AS there, * FROM read_parquet(
            {folder} || subset || '/' || a || '/steps/[!.]*_deduplicate.parquet', allow_empty = true, filename = true)
        UNION ALL BY NAME SELECT b AS there, * FROM read_parquet(
            {folder} || subset || '/' || b || '/steps/[!.]*_deduplicate.parquet', allow_empty = true, filename = true)
    ) JOIN steps ON there = version AND ends_with(filename, '/' || file)
),
read_files AS (
    SELECT version, shard, any_value(missing) AS missing,
        map_from_entries(list((input, fingerprint)) FILTER (WHERE input IS NOT NULL)) AS inputs
    FROM subset_shards WHERE recipe = subset AND version IN (a, b) GROUP BY version, shard
),
shard_facts AS MATERIALIZED (
    SELECT h.version AS here, h.shard, t.shard IS NOT NULL AND t.missing IS NULL AS read_there, t.missing,
        list_sort(list_filter(map_keys(h.inputs),
            lambda input: input IN map_keys(t.inputs) AND t.inputs[input] <> h.inputs[input])) AS made_again
    FROM read_files AS h LEFT JOIN read_files AS t
        ON t.shard = h.shard AND t.version = CASE h.version WHEN a THEN b ELSE a END
    WHERE h.missing IS NULL
),
version_facts AS MATERIALIZED (
    SELECT t.version AS there, t.kind <> 'pool' AS from_list, t.name AS from_name,
        CASE WHEN (t.kind, t.name) IS DISTINCT FROM (h.kind, h.name) THEN 0 ELSE (
            SELECT min(step) FROM steps AS s WHERE s.version = t.version AND NOT EXISTS (
                FROM steps AS same WHERE same.version = h.version AND same.step = s.step AND same.text = s.text)
        ) END AS first_other_step
    FROM sources AS t JOIN sources AS h ON h.version = CASE t.version WHEN a THEN b ELSE a END
),
-- Whatever refused a row before a union brought it in does not matter.
brought AS (
    SELECT steps.version, changed.f0, changed.f1, max(step) AS step
    FROM changed JOIN steps ON steps.kind = 'union'
        JOIN listed ON listed.there = steps.version AND listed.name = steps.set
            AND listed.f0 = changed.f0 AND listed.f1 = changed.f1
    GROUP BY ALL
),
placed AS (
    SELECT changed.*, read_there, missing, coalesce(made_again, []) AS made_again, first_other_step,
        coalesce(b.step, 0) AS brought_by, h.step AS brought_here_by,
        NOT from_list OR b.step IS NOT NULL OR listed.f0 IS NOT NULL AS in_source
    FROM changed JOIN version_facts USING (there) LEFT JOIN shard_facts USING (here, shard)
        LEFT JOIN brought AS b ON b.version = changed.there AND b.f0 = changed.f0 AND b.f1 = changed.f1
        LEFT JOIN brought AS h ON h.version = changed.here AND h.f0 = changed.f0 AND h.f1 = changed.f1
        LEFT JOIN listed ON listed.there = changed.there AND listed.name = version_facts.from_name
            AND listed.f0 = changed.f0 AND listed.f1 = changed.f1
),
-- The row as it is here, judged by the steps of there.
judged_steps AS MATERIALIZED (
    SELECT t.version AS there, t.step, t.kind, t.text, t.score, t.scores, t.set, t.threshold, t.tie_uid, t.file,
        -- A value that other rows had a part in can't be held against the cut of another version.
        coalesce(len(t.scores) > 1, false) AND (t.value IS DISTINCT FROM h.value OR contains(t.value, '"step'))
            AS among_others,
        h.threshold AS threshold_here, 'step' || h.step || '_value' AS figure,
        EXISTS (
            FROM steps AS same WHERE same.version = CASE t.version WHEN a THEN b ELSE a END
            AND same.kind = t.kind AND same.text = t.text
        ) AS same_there_and_here
    FROM steps AS t LEFT JOIN steps AS h
        ON h.version = CASE t.version WHEN a THEN b ELSE a END AND h.score = t.score
    QUALIFY row_number() OVER (PARTITION BY t.version, t.step ORDER BY abs(h.step - t.step)) = 1
),
judged AS (
    SELECT p.f0, p.f1, j.*, (p.figures->>j.figure)::DOUBLE AS value, alike.in_favour_of,
        CASE
            WHEN j.kind = 'union' THEN true
            WHEN j.kind IN ('within', 'intersect') THEN listed.f0 IS NOT NULL
            WHEN j.kind = 'except' THEN listed.f0 IS NULL
            WHEN j.file IS NOT NULL AND j.kind = 'deduplicate' THEN alike.f0 IS NULL
            WHEN j.kind IN ('where', 'deduplicate') THEN CASE WHEN same_there_and_here THEN true END
            WHEN NOT among_others THEN value > j.threshold
                OR (value = j.threshold AND (j.tie_uid IS NULL OR p.uid <= j.tie_uid))
        END AS passes
    FROM placed AS p JOIN judged_steps AS j USING (there)
        LEFT JOIN listed ON listed.there = p.there AND listed.name = j.set AND listed.f0 = p.f0 AND listed.f1 = p.f1
        LEFT JOIN alike ON alike.there = p.there AND alike.step = j.step AND alike.f0 = p.f0 AND alike.f1 = p.f1
    WHERE p.read_there AND p.in_source AND j.step > p.brought_by
),
refused AS (
    SELECT f0, f1, arg_min(
        judged, (kind IN ('stratify', 'soft_cap_sample') OR (kind = 'keep_top' AND among_others), step)) AS stop
    FROM judged WHERE passes IS NOT TRUE GROUP BY f0, f1
),
-- Where no step refuses it, a score that was computed again did, at the only step that ranks such a score.
rescored AS (
    SELECT p.f0, p.f1, arg_min(j, j.step) AS stop FROM placed AS p JOIN judged AS j USING (f0, f1, there)
    WHERE list_has_any(p.made_again, list_transform(coalesce(j.scores, [j.score]), lambda score: score_asset(score)))
    GROUP BY p.f0, p.f1 HAVING count(*) = 1
),
told AS (
    SELECT p.*,
        -- Here a union brought it in, and nothing but that union's list is missing there.
        brought_here_by > brought_by AND (NOT in_source OR coalesce(refused.stop.step < brought_here_by, false))
            AS by_union,
    CASE
        WHEN NOT read_there AND change = 'entered' THEN 'new shard'
        WHEN NOT read_there THEN 'shard removed'
        WHEN NOT in_source AND first_other_step = 0 THEN 'recipe changed'
        WHEN by_union AND brought_here_by >= first_other_step THEN 'recipe changed'
        WHEN by_union THEN 'list changed'
        WHEN NOT in_source THEN 'source changed'
        WHEN refused.stop.step >= first_other_step THEN 'recipe changed'
        WHEN refused.stop.set IS NOT NULL THEN 'list changed'
        WHEN refused.stop.kind = 'deduplicate' THEN 'duplicate'
        WHEN refused.stop.kind = 'soft_cap_sample' THEN 'not drawn'
        WHEN refused.stop IS NOT NULL THEN 'threshold moved'
        WHEN list_contains(made_again, 'raw_pool') THEN 'shard changed'
        WHEN len(made_again) > 0 THEN 'score changed'
        ELSE 'another copy'
    END AS reason,
    CASE WHEN by_union OR reason = 'shard changed' THEN NULL WHEN reason = 'score changed' THEN rescored.stop
        ELSE refused.stop END AS stop
    FROM placed AS p LEFT JOIN refused USING (f0, f1) LEFT JOIN rescored USING (f0, f1)
)
SELECT change, uid, shard, key, reason,
    CASE WHEN stop IS NOT NULL THEN stop.step WHEN reason = 'list changed' THEN brought_here_by
        WHEN reason NOT IN ('score changed', 'another copy') THEN 0 END AS step,
    CASE WHEN stop IS NOT NULL THEN stop.text WHEN reason = 'list changed' THEN (
        SELECT any_value(u.text) FROM steps AS u WHERE u.version = told.there AND u.step = told.brought_here_by
    ) END AS text, stop.value AS value,
    CASE change WHEN 'left' THEN stop.threshold_here ELSE stop.threshold END AS threshold_a,
    CASE change WHEN 'left' THEN stop.threshold ELSE stop.threshold_here END AS threshold_b,
    nullif(concat_ws('; ',
        missing,
        CASE WHEN stop.passes IS NULL AND reason = 'recipe changed' AND stop IS NOT NULL
            THEN 'this step or a later one: ' || here || ' has no value for it' END,
        CASE WHEN stop.passes IS NULL AND reason IN ('threshold moved', 'not drawn')
            THEN 'this step or a later one: ' || CASE stop.kind WHEN 'stratify' THEN 'the cut of its stratum'
                WHEN 'soft_cap_sample' THEN 'what is drawn' ELSE 'a combined value' END || ' depends on the other rows'
            END,
        'in favour of ' || stop.in_favour_of,
        CASE WHEN reason = 'another copy' THEN 'another row with this uid stood for it' END,
        'made again between the two: ' || nullif(array_to_string(made_again, ', '), '')
    ), '') AS detail
FROM told
WHERE (
    SELECT CASE WHEN count(*) FILTER (WHERE version = a) = 1 AND count(*) FILTER (WHERE version = b) = 1 THEN true
        ELSE error(concat('subset ', subset, ' has no version ', a, ', or no version ', b, '. FROM versions(''', subset,
            ''') lists those that it has.'))::BOOLEAN END
    FROM sources)
ORDER BY change, f0, f1
