"""Where rows come from: files, libraries and functions, and the steps that clean rows."""
