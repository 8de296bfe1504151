"""Opening a checkpoint: whose files it has, which family wrote them, which model they are."""
