"""Pictures in, pictures out: files of 8 and 16 bits, and tiles of any size."""
