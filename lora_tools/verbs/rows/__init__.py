"""The rows of the table of verbs, by what they work on."""
