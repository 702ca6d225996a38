"""From prompts to candidate directions: chat format, streaming moments, mean differences."""
