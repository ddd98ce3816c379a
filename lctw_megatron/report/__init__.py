"""What a person looks at: tables, plots, coloured text, the HTML page of a run or a comparison."""
