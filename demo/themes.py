"""The small world that the demo's posts are written from: who, what happened, what is asked.

An event or a question is one line, "wording | wording || concept, concept": every wording says the same, and
a text that names every concept has said it. "a/b" are spellings of one concept, each the start of a word.
The wordings of an event are predicates: their subject is the person the post is about.
Slots: {he} {him} {his} are that person's pronouns, {P} is "my" and the person, the others are keys of SLOTS.
"""


def words(text: str) -> list[str]:
    return text.split()


NUMBERS = words("two three four five six eight")

SLOTS = {
    "thing": words(
        "bike guitar laptop camera phone jacket blender sofa television watch tent printer keyboard drill"
    ),
    "food": words("chocolate onions grapes cheese chicken raisins bread bacon sausage peanuts"),
    "body": words("knee shoulder ankle elbow back neck wrist hip thumb jaw"),
    "sum": ["$200", "$350", "$500", "$800", "$1200", "$2500", "$4000"],
    "span": [f"{n} {unit}" for unit in ("weeks", "months", "years") for n in NUMBERS],
    "city": words("Boston Denver Chicago Toronto London Dublin Seattle Austin Berlin Sydney"),
    "day": words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "subject": words("math biology history chemistry physics statistics economics spanish"),
    "car": words("truck sedan van scooter minivan hatchback motorcycle jeep"),
}

HE = set(words("boyfriend husband brother dad uncle son nephew grandfather stepson"))
SHE = set(words("girlfriend wife sister mom aunt daughter niece grandmother stepdaughter"))

# In every theme: people with an opinion, things that also happened, feelings. No post is about these.
BYSTANDERS = words("friend mom sister brother neighbor cousin aunt therapist barber grandmother")
OPINIONS = [
    "My {other} says I am overreacting.",
    "My {other} thinks I should let it go.",
    "I told my {other} and got no useful answer.",
    "My {other} agrees with me.",
    "Even my {other} noticed that something was off.",
]
MINOR = [
    ("I had already lost my keys that morning.", "lost my keys"),
    ("It did not help that I missed the bus that day.", "missed the bus"),
    ("On top of that I spilled coffee on the carpet.", "spilled coffee on the carpet"),
    ("I was also getting over a cold at the time.", "was getting over a cold"),
    ("I had just finished painting the kitchen.", "finished painting the kitchen"),
    ("I had been up late watching a movie.", "was up late watching a movie"),
    ("I was busy planting tomatoes in the garden.", "was planting tomatoes in the garden"),
    ("I had just come back from the library.", "came back from the library"),
    ("It rained all day and the basement flooded.", "had a flooded basement"),
    ("I was in the middle of baking a cake.", "was baking a cake"),
]
FEELINGS = [
    "I feel hurt and I can not stop thinking about it.",
    "I am tired and I do not want a big fight.",
    "I try to stay calm but it is hard.",
    "I did not say anything at first.",
    "Part of me wants to laugh about it.",
    "I have not slept well since then.",
    "I do not want to make it worse.",
    "It has been on my mind ever since.",
]
INVENTED = [
    "crashed the wedding",
    "called the police",
    "adopted a parrot",
    "moved to Mexico",
    "won the lottery",
    "bought a boat",
    "quit smoking",
    "burned down the shed",
    "joined the army",
    "wrote a novel",
    "stole a horse",
    "got arrested at the airport",
    "broke a window",
    "hired a lawyer",
    "ran a marathon",
    "married a pilot",
]
VAGUE = ["did something", "did a bad thing", "is being difficult", "has a problem", "made things weird"]
OPENERS = [
    "So this is a bit of a long story but basically what happened is that",
    "To make a long story short I just wanted to say that",
    "I really do not know how to start this but the thing is that",
]
CLOSERS = [
    "I just do not know what to do about any of this anymore and it is really a lot.",
    "Sorry that this is so long, I just really had to get all of this out of me.",
    "It is what it is, but still, it is a lot and I really do not know about it.",
]

THEMES = {
    "relationships": {
        "people": words("girlfriend boyfriend wife husband fiance partner"),
        "background": [
            "I have been with {P} for {span}.",
            "{P} and I live together in {city}.",
            "{P} and I met in {city}, {span} ago.",
        ],
        "details": [
            "{he} says that it was only a joke.",
            "We argued about it the whole evening.",
            "{he} has never done anything like this before.",
            "{he} refuses to apologize.",
            "We had planned a nice weekend.",
        ],
        "events": [
            "sold my {thing} without asking | got rid of my {thing} without asking || sold/rid, {thing}, ask",
            "read my diary | went through my diary in secret || diary, read/went through",
            "forgot my birthday | did not remember my birthday || birthday, forgot/remember",
            "is still texting an ex | keeps sending texts to an ex || ex, text",
            "lied about a {sum} loan | hid a loan of {sum} from me || loan, {sum}, lie/hid",
            "wants to move to {city} | plans to move to {city} || move/moving, {city}",
            "cancelled our trip to {city} | called off our trip to {city} || trip, {city}, cancel/called off",
            "kissed someone at a party | shared a kiss with someone at a party || kiss, party",
            "broke my {thing} in anger | smashed my {thing} in anger || {thing}, broke/smash, ang",
        ],
        "questions": [
            "should I break up with {him} | is it time to break up with {him} || break up",
            "how do I talk to {him} about it | what is the right way to talk to {him} || talk",
            "can I ever trust {him} again | how do I learn to trust {him} again || trust",
            "should I forgive {him} | is it right to forgive {him} || forgiv",
            "am I wrong to be upset | is it wrong that I am upset || wrong, upset",
        ],
    },
    "roommates": {
        "people": words("roommate landlord housemate subletter neighbor"),
        "background": [
            "I have lived next to {P} for {span}.",
            "I moved into this place in {city} {span} ago.",
            "{P} and I share a building in {city}.",
        ],
        "details": [
            "The rent is due on {day}.",
            "The walls are thin and I hear everything.",
            "{he} laughs every time I bring it up.",
            "We have a written agreement.",
            "I left a note on the door.",
        ],
        "events": [
            "plays loud music at night | blasts loud music every night || music, loud, night",
            "took my {thing} and lost it | lost my {thing} after taking it || {thing}, lost, took/tak",
            "never washes the dishes | leaves dirty dishes everywhere || dishes",
            "owes me {sum} for bills | will not pay me {sum} for bills || {sum}, bill, owe/pay",
            "eats my {food} every week | steals my {food} every week || {food}, eat/steal",
            "raised the rent by {sum} | wants {sum} more in rent || rent, {sum}",
            "let a stranger sleep on my {thing} | had a stranger nap on my {thing} || stranger, {thing}",
            "smokes inside the flat | keeps smoking inside the flat || smok, inside",
            "threw my {food} in the trash | put my {food} in the trash || {food}, trash",
        ],
        "questions": [
            "should I move out | is it time for me to move out || move out",
            "can I ask {him} to pay for it | is it fair to make {him} pay for it || pay for",
            "how do I get {him} to stop | what will make {him} stop || stop",
            "should I report {him} | where can I report {him} || report",
            "how do I stay polite about it | is there a polite way to handle it || polite",
        ],
    },
    "AskDocs": {
        "people": words("son daughter wife husband mom dad grandmother nephew"),
        "background": [
            "{P} is healthy and takes no medicine.",
            "We live in {city} and the clinic is far away.",
            "{P} has had no surgery and no allergies.",
        ],
        "details": [
            "It is worse in the evening.",
            "There is no swelling that I can see.",
            "{he} drinks enough water.",
            "It began on {day}.",
            "{he} says it is not so bad.",
        ],
        "events": [
            "has had a sore {body} for {span} | had {body} pain for {span} || {body}, {span}, sore/pain",
            "fell off a {car} and hurt the {body} | hurt the {body} on a {car} || {body}, {car}, hurt",
            "gets a rash after eating {food} | has a rash from eating {food} || rash, {food}",
            "has had a fever since {day} | is running a fever since {day} || fever, {day}",
            "keeps fainting at school | faints at school all the time || faint, school",
            "has a lump on the {body} | found a lump on the {body} || lump, {body}",
            "can not bend the {body} | is unable to bend the {body} || bend, {body}",
            "has been dizzy for {span} | feels dizzy since {span} ago || dizzy, {span}",
            "swallowed a coin | has a coin in the stomach || coin, swallow/stomach",
        ],
        "questions": [
            "should {he} see a doctor | does {he} need to see a doctor || doctor",
            "is it safe to wait | how long is it safe to wait || safe, wait",
            "which pills can help {him} | are there pills that help {him} || pills",
            "does {he} need an xray | would an xray be useful || xray",
            "could it be an infection | is this an infection || infection",
        ],
    },
    "pets": {
        "people": words("dog cat puppy kitten rabbit parrot hamster"),
        "background": [
            "I have had {P} for {span}.",
            "I adopted {P} from a shelter in {city}.",
            "{P} is {span} old and very sweet.",
        ],
        "details": [
            "{he} gets two meals and a lot of play.",
            "{he} still has a lot of energy.",
            "The vet is closed until {day}.",
            "Nothing else has changed at home.",
            "{he} hides under the table.",
        ],
        "events": [
            "ate a lot of {food} | got into the bag and ate {food} || ate/eat, {food}",
            "chewed up my {thing} | destroyed my {thing} by chewing on it || chew, {thing}",
            "is limping since {day} | has had a limp since {day} || limp, {day}",
            "pees on my {thing} | keeps peeing on my {thing} || pee, {thing}",
            "has not eaten since {day} | refuses to eat since {day} || eat, {day}",
            "bit a guest on {day} | gave a guest a bite on {day} || guest, {day}, bit",
            "wakes me up all night | keeps waking me up all night || wak, night",
            "ran away on {day} | has been running away since {day} || away, {day}, ran/run",
            "is scared of my {car} | gets scared whenever I start my {car} || scared, {car}",
        ],
        "questions": [
            "should I go to the vet | do we need a vet right now || vet",
            "how do I train {him} | can I train {him} to be good || train",
            "should I give {him} away | is it cruel to give {him} away || give",
            "what food is best now | which food should I try || food",
            "would a second pet help | is a second pet a solution || second",
        ],
    },
    "jobs": {
        "people": words("boss manager coworker supervisor intern client"),
        "background": [
            "I have worked with {P} for {span}.",
            "I work in a small office in {city}.",
            "This is my first job and I started {span} ago.",
        ],
        "details": [
            "The others in the office stay silent.",
            "{he} sent me an email about it.",
            "My contract ends on {day}.",
            "I have always been on time.",
            "{he} smiles as if all was fine.",
        ],
        "events": [
            "took credit for my report | claimed credit for my report || credit, report",
            "cut my pay by {sum} | reduced my pay by {sum} || pay, {sum}, cut/reduc",
            "yelled at me in a meeting | shouted at me in a meeting || meeting, yell/shout",
            "makes me work every {day} | wants me at work every {day} || work, {day}",
            "denied my vacation in {city} | refused my vacation in {city} || vacation, {city}, den/refus",
            "promised me a {sum} raise and forgot | forgot a promised {sum} raise || raise, {sum}, promis",
            "gave my desk to a stranger | let a stranger have my desk || desk, stranger",
            "wants me to transfer to {city} | asked me to transfer to {city} || transfer, {city}",
            "spilled soup on my {thing} | got soup all over my {thing} || soup, {thing}",
        ],
        "questions": [
            "should I quit | is it time to quit || quit",
            "should I go to HR | would HR help me || hr",
            "how do I ask for a fair deal | can I ask for a fair deal || fair",
            "should I look for a new job | is it smart to look for a new job || new job",
            "how do I say no to {him} | is it okay to say no to {him} || say no",
        ],
    },
    "personalfinance": {
        "people": words("brother sister cousin uncle aunt friend dad"),
        "background": [
            "I have saved money for {span}.",
            "{P} and I shared an account in {city}.",
            "I make enough and I have no debt.",
        ],
        "details": [
            "The bank did not help.",
            "I have all the receipts.",
            "{he} has a good income.",
            "We never signed anything.",
            "The next payment is on {day}.",
        ],
        "events": [
            "borrowed {sum} and never paid it back | never paid me back {sum} || {sum}, paid/pay, back",
            "used my card to buy a {thing} | bought a {thing} with my card || card, {thing}",
            "wants me to cosign for a {car} | asked me to cosign a loan on a {car} || cosign, {car}",
            "lost {sum} of my savings | gambled away {sum} of my savings || {sum}, savings, lost/gambl",
            "opened an account in my name | used my name to open an account || account, name, open",
            "asks me for {sum} every month | begs me for {sum} every month || {sum}, month, ask/beg",
            "sold my {car} for {sum} | got {sum} by selling my {car} || {car}, {sum}, sold/sell",
            "left me a debt of {sum} | died with a debt of {sum} in my name || debt, {sum}",
            "pawned my {thing} for {sum} | took my {thing} to a pawn shop for {sum} || pawn, {thing}, {sum}",
        ],
        "questions": [
            "should I go to court | is court worth it || court",
            "how do I get my money back | can I get my money back || money, back",
            "should I close my account | do I have to close my account || close",
            "how do I protect my credit score | will it ruin my credit score || score",
            "should I set up a payment plan | is a payment plan fair || plan",
        ],
    },
    "Parenting": {
        "people": words("son daughter stepson stepdaughter teenager toddler"),
        "background": [
            "I am raising {P} alone in {city}.",
            "{P} started at a new school {span} ago.",
            "We moved to {city} with {P} {span} ago.",
        ],
        "details": [
            "The teacher called me on {day}.",
            "{he} is usually kind and quiet.",
            "{he} cried when I asked why.",
            "We have dinner together every night.",
            "I do not like to yell.",
        ],
        "events": [
            "failed {subject} | got a failing grade in {subject} || fail, {subject}",
            "stole {sum} from my purse | took {sum} out of my purse || purse, {sum}, stole/took",
            "hit a child at school | punched a child at school || child, school, hit/punch",
            "refuses to go to bed | will not go to bed at night || bed",
            "skipped school on {day} | did not go to school on {day} || school, {day}, skip/not go",
            "only wants to eat {food} | will eat nothing but {food} || eat, {food}",
            "broke a {thing} at school | damaged a {thing} at school || {thing}, school, broke/damag",
            "spends all day on a {thing} | is on a {thing} all day || {thing}, day",
            "wants to drop out of {subject} | plans on dropping out of {subject} || drop, {subject}",
        ],
        "questions": [
            "how should I punish {him} | is it right to punish {him} || punish",
            "should I get a counselor | would a counselor be good for {him} || counselor",
            "is it just a phase | could it be a phase || phase",
            "should I limit screen time | do limits on screen time work || screen",
            "how do I get {him} to listen | what makes {him} listen || listen",
        ],
    },
    "college": {
        "people": words("professor classmate tutor advisor dean roommate"),
        "background": [
            "I study in {city} and I met {P} {span} ago.",
            "I am taking {subject} this term.",
            "{P} is known all over campus.",
        ],
        "details": [
            "The exam is on {day}.",
            "I have kept all the emails.",
            "{he} only shrugged when I asked.",
            "My grades were good until now.",
            "I pay for my classes by myself.",
        ],
        "events": [
            "accused me of cheating in {subject} | said that I was cheating in {subject} || cheat, {subject}",
            "copied my {subject} essay | handed in a copy of my {subject} essay || essay, {subject}, cop",
            "lost my {subject} exam | can not find my {subject} exam || exam, {subject}, lost/find",
            "wants {sum} for my notes | asks me for {sum} for old notes || notes, {sum}",
            "did nothing for our {subject} project | skipped our {subject} project || project, {subject}",
            "gave me a zero in {subject} | put a zero on my {subject} paper || zero, {subject}",
            "moved the final to {day} | changed the final to {day} || final, {day}",
            "dropped me from {subject} | took me off the list for {subject} || {subject}, drop/list",
            "lost my {thing} before finals | lost my {thing} right before finals || {thing}, lost, finals",
        ],
        "questions": [
            "should I complain to the school | where do I complain || complain",
            "should I switch my major | is it too late to switch my major || switch, major",
            "how do I prove that I am right | what would prove it || prove",
            "can I retake the class | is it possible to retake the class || retake",
            "should I write {him} an email | is an email the best way || email",
        ],
    },
    "legaladvice": {
        "people": words("neighbor mechanic landlord dealer contractor tenant"),
        "background": [
            "I own a small house in {city}.",
            "I have known {P} for {span}.",
            "I hired {P} {span} ago.",
        ],
        "details": [
            "I took pictures of everything.",
            "There is no written contract.",
            "{he} hung up on me on {day}.",
            "I sent a letter and heard nothing.",
            "{he} blames the weather.",
        ],
        "events": [
            "scratched my {car} and drove off | drove off after scratching my {car} || scratch, {car}",
            "charged me {sum} for nothing | billed me {sum} for no work || {sum}, charg/bill",
            "cut down my tree | had my tree cut down || tree, cut",
            "keeps my deposit of {sum} | will not return my {sum} deposit || deposit, {sum}",
            "sold me a broken {car} | tricked me into buying a broken {car} || broken, {car}",
            "built a fence on my land | put a fence on my land || fence, land",
            "left my roof half finished | never finished my roof || roof, finish",
            "threw out my {thing} | put my {thing} out on the street || {thing}, out",
            "blocks my driveway with a {car} | parks a {car} in my driveway || driveway, {car}",
        ],
        "questions": [
            "can I sue {him} | is it worth it to sue {him} || sue",
            "do I need an attorney | should I pay for an attorney || attorney",
            "will my insurance cover it | should I ask my insurance || insurance",
            "should I withhold rent or payment | may I withhold any payment || withhold",
            "what evidence do I need | is my evidence enough || evidence",
        ],
    },
    "family": {
        "people": words("mom dad sister brother aunt uncle cousin niece grandmother grandfather"),
        "background": [
            "{P} lives in {city} and visits a lot.",
            "I moved back in with {P} {span} ago.",
            "{P} and I were always close.",
        ],
        "details": [
            "The rest of the family takes no side.",
            "{he} left in the middle of dinner.",
            "Nobody wants to mention it.",
            "{he} called me again on {day}.",
            "We used to laugh a lot.",
        ],
        "events": [
            "told everyone about my divorce | announced my divorce to everyone || divorce, everyone",
            "did not invite me to the reunion | left me out of the reunion || reunion, invit/left",
            "gave away my {thing} | donated my {thing} to charity || {thing}, gave/donat",
            "insulted my cooking | said that my cooking is awful || cooking",
            "wants to live with me in {city} | plans to live with me in {city} || live, {city}",
            "stopped talking to me on {day} | has not been talking to me since {day} || talking, {day}",
            "served me {food} despite my allergy | fed me {food} despite my allergy || {food}, allergy",
            "took {sum} from grandfather's will | got {sum} too much from grandfather's will || will, {sum}",
            "burned my {thing} by accident | set my {thing} on fire by accident || {thing}, burn/fire",
        ],
        "questions": [
            "should I skip the holidays | is it rude to skip the holidays || holiday",
            "how do I make peace with {him} | can we make peace || peace",
            "should I cut contact | is it too harsh to cut contact || contact",
            "do I owe {him} an apology | am I the one who owes an apology || apolog",
            "how do I set boundaries | will boundaries help || boundar",
        ],
    },
    "travel": {
        "people": words("friend cousin guide driver host boyfriend girlfriend"),
        "background": [
            "I went to {city} with {P}.",
            "{P} and I planned this for {span}.",
            "I know {P} from an earlier trip to {city}.",
        ],
        "details": [
            "The hotel was lovely.",
            "We had only one bag each.",
            "{he} did not seem to care.",
            "I had to wait until {day}.",
            "The weather was great all the time.",
        ],
        "events": [
            "lost my passport in {city} | left my passport in {city} || passport, {city}",
            "booked the wrong flight to {city} | got us on a wrong flight to {city} || flight, wrong, {city}",
            "left me alone in {city} | went home without me from {city} || {city}, alone/without",
            "spent my {sum} on souvenirs | used up my {sum} to buy souvenirs || souvenir, {sum}",
            "cancelled on {day} | backed out on {day} || {day}, cancel/back",
            "dropped my {thing} in the sea | let my {thing} fall in the sea || sea, {thing}",
            "wants {sum} for the ride | asks {sum} for the ride || ride, {sum}",
            "got food poisoning from {food} | became ill with food poisoning from {food} || poison, {food}",
            "crashed the rental {car} | drove the rental {car} into a wall || rental, {car}",
        ],
        "questions": [
            "should I travel alone next time | is it better to travel alone || travel",
            "can I get a refund | who do I ask for a refund || refund",
            "should I go home early | is it silly to go home early || early",
            "does the embassy help | should I call the embassy || embassy",
            "how do we split the cost | is it fair to split the cost || split, cost",
        ],
    },
    "Fitness": {
        "people": words("coach trainer teammate partner instructor captain"),
        "background": [
            "I have trained with {P} for {span}.",
            "I joined a gym in {city} {span} ago.",
            "{P} and I started running {span} ago.",
        ],
        "details": [
            "I lift and run every {day}.",
            "{he} is in great shape.",
            "I drink water and I sleep eight hours.",
            "The next race is on {day}.",
            "{he} pushes all of us a lot.",
        ],
        "events": [
            "told me to train with a hurt {body} | makes me train with a hurt {body} || train, {body}, hurt",
            "kicked me off the team | threw me off the team || team, off",
            "says I must only eat {food} | put me on a diet of {food} || {food}, diet/eat",
            "charged me {sum} for one class | took {sum} for one class || {sum}, class",
            "injured my {body} while stretching | injured my {body} by stretching || {body}, injur, stretch",
            "mocked my weight on {day} | made fun of my weight on {day} || weight, {day}",
            "skips every session on {day} | never comes to a session on {day} || session, {day}",
            "dropped a weight on my {thing} | crushed my {thing} with a weight || weight, {thing}",
            "broke a {body} during practice | had a broken {body} after practice || {body}, practice, broke",
        ],
        "questions": [
            "should I change gyms | is it time to change gyms || gym",
            "how long should I rest | do I have to rest || rest",
            "is this diet or plan healthy | what is a healthy plan || healthy",
            "can I train on my own | is it better to train on my own || own",
            "should I confront {him} | how do I confront {him} || confront",
        ],
    },
}
