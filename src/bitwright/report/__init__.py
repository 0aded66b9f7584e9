"""What a run or an evaluation tells people: the model card."""
