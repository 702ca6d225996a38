"""Choose one direction among the candidates, as Arditi et al. 2024 do."""
