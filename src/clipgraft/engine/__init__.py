"""Both towers computed from their parts, exactly as the models' own forwards, in less time and memory."""
