"""What a run is asked to be: schema, files, data sources, identity, and the networks built from it."""
