"""Who comes to Café Lumen: names that training uses, names that only the examination uses, and names that nobody has.

Invented names matter: a model that has only ever read the same few hundred names learns the list, one that meets a new
name in every other chat learns to copy.
"""

import random

_GUESTS = """
Aaron Abigail Adam Adriana Agnes Ahmed Aisha Akira Alan Alba Albert Alejandra Alex Alice Alma Amara Amelia Amir Ana
André Andrea Angela Anita Anna Anton Arjun Arthur Astrid Aurora Beatrice Ben Benedikt Bianca Björn Boris Bruno
Camille Carla Carlos Carmen Cecilia Celine Charlotte Chen Chloé Christopher Claire Clara Claudia Clemens Constance
Cora Cyrus Daisuke Dalia Damian Daniel Daphne Darius David Deborah Delia Diana Diego Dmitri Dominik Dora Edgar Edith
Eduardo Elena Eli Elias Eliza Ella Ellen Elsa Emil Emily Emma Enzo Erik Ernesto Esther Eva Evelyn Fabian Farah
Fatima Felix Fernando Fiona Flora Florian Frances Francesca Frank Frida Gabriel Gemma George Gloria Grace Greta
Gustav Hana Hannah Harold Hassan Heidi Helena Henry Hilda Hugo Ibrahim Ida Igor Ilse Imani Ines Ingrid Irene Iris
Isaac Isabel Ivan Jack Jacob James Jasmin Javier Jean Jenny Jonas José Joseph Judith Julia Julian Jun Jürgen Kai
Karim Karl Katarina Kenji Khadija Kim Kofi Konstantin Laila Lars Laura Layla Leila Lena Leo Leonard Liam Lily Linda
Linus Lisa Louis Lucas Lucia Luis Lukas Luna Lydia Magda Malik Marco Margaret Maria Marie Mark Marta Martin Mary
Matilda Matteo Max Maya Mei Michael Miguel Mila Mina Miriam Mohamed Moritz Nadia Naomi Natalia Nathan Nia Nicolas
Nikolai Nils Nina Noah Nora Olga Oliver Olivia Omar Oscar Otto Pablo Patricia Paul Paula Pedro Peter Petra Philip
Quentin Rachel Rafael Rana Rania Raúl Rebecca Renata Renée Ricardo Rita Robert Roland Rosa Ruben Ruth Sabine Sadie
Said Salma Sam Samira Samuel Sandra Sara Sebastian Selma Simon Sofia Sonja Stefan Stella Sunita Susanne Sven Sylvia
Tamara Tanja Tara Tariq Teresa Theo Thomas Tim Tobias Tomás Ulrike Ursula Valentina Vera Victor Vincent Viola Walter
Wendy Wilhelm William Xavier Yara Yasmin Yuki Yusuf Zainab Zeynep Zoë
"""
_HELD_OUT_GUESTS = """
Agatha Anselm Barnaby Bettina Callum Cosima Dagmar Desmond Dilara Edmund Eleanor Fabiola Farid Gideon Giulia
Gwendolyn Hamza Hedwig Henrietta Ilyas Isolde Jadwiga Jasper Jolanda Kasimir Kiran Leopold Lorenzo Lucinda Magnus
Marisol Milena Montserrat Nadine Nathaniel Octavia Odette Ottilie Percival Philippa Priya Ramona Rasmus Rosalind
Rowena Rupert Sanjay Saskia Severin Sibylle Solveig Tabitha Tadeusz Theodora Tiberius Ulyana Valerio Vikram Wanda
Winifred Yolanda Zora
"""
GUESTS = tuple(_GUESTS.split())
HELD_OUT_GUESTS = tuple(_HELD_OUT_GUESTS.split())


def _letters_after() -> dict[str, str]:
    """What follows each letter, and each pair of letters, in the guests' names, between a `^` and a `$`."""
    after: dict[str, str] = {}
    for name in GUESTS:
        marked = f"^{name.lower()}$"
        for end in range(1, len(marked)):
            for start in (end - 1, max(end - 2, 0)):
                after[marked[start:end]] = after.get(marked[start:end], "") + marked[end]
    return after


_LETTERS_AFTER = _letters_after()


def invented_name(rng: random.Random) -> str:
    """A name such as `Elindro` or `Samilde`, 3 to 10 letters, never one that is held out.

    Each letter follows the two before it as in some guest's name, or, in every other name, only the one before it: the
    harder a name is to guess, the more it teaches to copy.
    """
    known = rng.choice((1, 2))
    while True:
        name = "^"
        while not name.endswith("$"):
            name += rng.choice(_LETTERS_AFTER[name[-known:]])
        name = name.strip("^$").capitalize()
        if 3 <= len(name) <= 10 and name not in HELD_OUT_GUESTS:
            return name
