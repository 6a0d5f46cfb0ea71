"""The page to try a model on: upload, compare, play with a blur."""
