"""What a save writes: how arrays are cut over ranks, who writes which part, and what is agreed on."""
