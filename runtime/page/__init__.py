"""What people look at: pictures, the pages of runs, cohorts and checks, and the viewer in them."""
