"""Reference methods that prompts have to beat, one file a method."""
