-- Half of a uid as a number: from place 1 or 17 of its text; NULL if the text is no uid.
CREATE MACRO uid_word(sample, place) AS
    CASE WHEN regexp_full_match(sample, '[0-9a-fA-F]{32}')
    THEN ('0x' || substr(sample, place, 16))::UBIGINT END
