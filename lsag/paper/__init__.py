"""The paper's tables: what they are, run again, and the released formulation as a measure."""
