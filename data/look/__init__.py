"""Looking at data: contact sheets and statistics of what a run would train on."""
