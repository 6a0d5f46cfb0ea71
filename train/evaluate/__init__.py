"""Scores and what is shown of them: metrics, tables, pictures, reports."""
