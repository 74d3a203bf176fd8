"""What a run found, for people: the model card of a repository and the HTML report."""
