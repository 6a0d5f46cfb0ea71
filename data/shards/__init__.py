"""Sets of WebDataset tars beside an index that says what each byte is; local or remote."""
