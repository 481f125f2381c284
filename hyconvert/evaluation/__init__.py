"""Is a converted model as good as its base, and is it really sparse? What `hyconvert eval` measures and shows."""
