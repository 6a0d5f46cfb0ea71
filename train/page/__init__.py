"""Pages of one file for a browser: text, tables, charts and pictures, with nothing to fetch."""
