"""The report of a run: results.json, one text table, one self-contained HTML page."""
