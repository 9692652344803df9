"""Chat templates of models: how they are read, written without control tokens from content, and think."""
