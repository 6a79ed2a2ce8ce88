"""From files and hub datasets to examples in batches: text, instructions and the tasks of GLUE."""
