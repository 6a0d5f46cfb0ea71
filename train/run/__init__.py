"""A run put together: session, step, schedule, records, and its folder."""
